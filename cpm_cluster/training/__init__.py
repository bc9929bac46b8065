"""A trainer for CPM-style decoders: full tuning and LoRA behind one engine seam, evaluation and generation.

Programs are ``pretrain``, ``finetune``, ``evaluate`` and ``generate``; start one with ``torchrun --nproc-per-node N
-m cpm_cluster.training.finetune /path/trainer.json``. They run inside the training image (Python 3.8, torch 1.13 and
newer) and therefore import nothing else of this project.

Where things are:

* a task from start to end: ``program``, ``attempt``, then ``run`` (training) or one of ``inference``
* ``model``: decoder, layers, attention, LoRA; ``engines`` compute it
* ``data``: rows of text, tokenizers, ids on disk, their order, packing, batches
* what is kept: ``checkpoint``, ``formats`` (weights of others), ``trained``, ``adapter`` and ``export``
* ``reporting``: progress, heartbeats, metrics, TensorBoard
"""
