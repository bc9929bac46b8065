"""Words of other tools, and what they are called in a job file: for whoever comes from hand-typed commands."""

from __future__ import annotations

import dataclasses

from cpm_cluster.specs.fields import Section, yaml_name
from cpm_cluster.specs.job import JobSpec

# As sbatch(1), docker-run(1), conda, transformers' TrainingArguments, DeepSpeed's JSON and CPM-9G's scripts have them,
# in lower case and with _ for -.
_ELSEWHERE = {
    "name": "job_name",
    "time_limit": "time timelimit walltime",
    "mounts": "volumes volume mount binds",
    "env": "environment envs export",
    "command": "script cmd entrypoint run program args",
    "runtime": "docker conda podman rootless",
    "init_from": "load pretrained model_path checkpoint_path model_name_or_path",
    "tokenizer": "vocab vocab_file",
    "data.train": "dataset train_file train_data train",
    "data.eval": "eval_dataset eval_file validation_file",
    "generation.prompts": "prompts prompts_file",
    "resources.gpus_per_node": "gres gpus gpus_per_task num_gpus nproc_per_node ntasks_per_node",
    "resources.nodes": "nnodes num_nodes",
    "resources.cpus_per_node": "cpus cpus_per_task",
    "resources.memory_per_node": "mem memory",
    "resources.shm": "shm_size",
    "resources.gpu": "gpu_type gpu_memory",
    "slurm.partition": "queue",
    "slurm.nodelist": "nodes_list hosts hostlist",
    "method.lora.rank": "lora_rank lora_r",
    "method.lora.alpha": "lora_alpha",
    "method.lora.dropout": "lora_dropout",
    "training.lr": "learning_rate",
    "training.micro_batch": "batch_size micro_batch_size per_device_train_batch_size train_micro_batch_size_per_gpu",
    "training.grad_accum": "gradient_accumulation_steps accumulate_grad_batches gradient_accumulate",
    "training.seq_len": "max_length max_len max_seq_length max_seq_len seq_length",
    "training.steps": "epochs epoch num_train_epochs max_steps train_iters num_steps",
    "training.warmup_steps": "warmup warmup_iters",
    "training.precision": "fp16 bf16 fp32 dtype mixed_precision",
    "training.attention": "flash_attn use_flash_attn flash",
    "training.recompute": "gradient_checkpointing activation_checkpointing",
    "training.offload_optimizer": "offload use_offload cpu_offload",
    "training.zero_stage": "zero",
    "training.schedule": "lr_scheduler_type lr_decay_style lr_schedule",
    "training.clip_grad_norm": "clip_grad max_grad_norm gradient_clipping",
    "training.log_every": "logging_steps inspect_iters log_interval",
    "training.eval_every": "eval_steps eval_interval",
    "training.checkpoint.every": "save_steps save_interval save_iters",
}


def meant_by(word: str) -> str | None:
    """The dotted key of a job file that a word stands for: another tool's, or one of a section that is not named."""
    word = word.lower().replace("-", "_")
    for key, words in _ELSEWHERE.items():
        if word in words.split():
            return key
    return next((key for key in _keys_in_sections() if key.rpartition(".")[2] == word), None)


def _keys_in_sections() -> list[str]:
    sections = {field.name: field.metadata["type"] for field in dataclasses.fields(JobSpec) if "type" in field.metadata}
    return [
        f"{name}.{yaml_name(field)}"
        for name, type_ in sections.items()
        if isinstance(type_, Section) and name != "workload"  # its keys are those of training
        for field in dataclasses.fields(type_.spec)
    ]
