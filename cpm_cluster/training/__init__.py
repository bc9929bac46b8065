"""A trainer for CPM-style decoders: full tuning and LoRA behind one engine seam, evaluation and generation.

Programs are ``pretrain``, ``finetune``, ``evaluate`` and ``generate``; start one with ``torchrun --nproc-per-node N
-m cpm_cluster.training.finetune /path/trainer.json``. They run inside the training image (Python 3.8, torch 1.13 and
newer) and therefore import nothing else of this project.

Where things are:

* a task from start to end: ``program``, ``attempt``, then ``run`` (training), ``evaluation``, ``generation``
* the model: ``model``, ``layers``, ``attention``, ``lora``; what computes it: ``engines``
* data: ``corpus`` (rows), ``tokenizer``, ``token_index`` and ``encoded_part`` (ids on disk), ``mixture`` (order),
  ``packing`` (rows of tokens), ``data`` (batches)
* what is kept: ``checkpoint``, ``formats`` (weights of others), ``trained`` and ``export``
* what is told: ``records``, ``board``, ``progress``, ``heartbeat``, ``measurements``
"""
