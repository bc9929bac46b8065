"""What a program of its own computes, as its user describes it: read by the planner alone."""

from __future__ import annotations

from dataclasses import dataclass

from cpm_cluster.specs.fields import Boolean, Choice, Integer, key

TRAINING_ENGINES = ("bmtrain", "deepspeed", "fsdp", "ddp")
INFERENCE_ENGINES = ("libcpm", "torch")
QUANTISED = ("int8", "int4")


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Training as `model` and `method` say, or inference of `model`. What is left out is as below.

    Inference spreads the weights over all GPUs of the job, in one process.
    """

    mode: str = key(Choice(("train", "infer")), "train, or infer")
    engine: str = key(
        Choice((*TRAINING_ENGINES, *INFERENCE_ENGINES)),
        "what holds the weights: bmtrain, deepspeed, fsdp or ddp in training, libcpm or torch in inference",
    )
    precision: str = key(Choice(("fp32", "bf16", "fp16", *QUANTISED)), "of the weights in use; int8, int4: inference")
    seq_len: int = key(Integer(1, 1 << 24), "tokens of the longest sequence; in inference prompt and answer together")
    micro_batch: int = key(Integer(1, 1 << 20), "sequences at once on a GPU; in inference on all together", 1)
    grad_accum: int = key(Integer(1, 1 << 20), "micro batches per optimizer step", 1)
    steps: int | None = key(Integer(1), "optimizer steps; left out: no time is predicted", None)
    recompute: str = key(Choice(("none", "full")), "activation checkpointing", "none")
    flash_attention: bool = key(Boolean(), "whether attention stores no scores", True)
    zero_stage: int = key(Integer(0, 3), "what is sharded, as in training.zero_stage", 3)
    offload_optimizer: bool = key(Boolean(), "optimizer states and step on the CPU", False)
    offload_param: bool = key(Boolean(), "weights on the CPU between uses (DeepSpeed stage 3, FSDP)", False)
