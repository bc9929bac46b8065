"""A trainer for CPM-style decoders: full tuning and LoRA behind one engine seam.

Start it with ``torchrun --nproc-per-node N -m cpm_cluster.training.finetune /path/trainer.json``. It runs
inside the training image (Python 3.8, torch 1.13 and newer) and therefore imports nothing else of this
project.
"""
