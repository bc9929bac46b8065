"""A trainer for CPM-style decoders: full tuning and LoRA behind one engine seam, evaluation and generation.

Programs are ``pretrain``, ``finetune``, ``evaluate`` and ``generate``; start one with ``torchrun --nproc-per-node N
-m cpm_cluster.training.finetune /path/trainer.json``. They run inside the training image (Python 3.8, torch 1.13 and
newer) and therefore import nothing else of this project.
"""
