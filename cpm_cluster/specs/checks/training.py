"""The model's shape and the hyper-parameters, as the engine takes them."""

from __future__ import annotations

from collections.abc import Iterator

from cpm_cluster.specs.checks.rules import Finding, reads
from cpm_cluster.specs.job import JobSpec

COLDEST = 0.001


@reads("model", "engine", "method")
def _model_shape(spec: JobSpec) -> Iterator[Finding]:
    model = spec.model
    if model is None:
        return
    if model.head_dim is None and model.hidden % model.heads:
        yield "model.heads", f"{model.heads} heads do not divide hidden {model.hidden}; change heads, or set head_dim"
    elif model.size_of_head % 2:
        yield "model.head_dim", f"{model.size_of_head} is odd; rotary embeddings turn pairs"
    if model.heads % model.key_value_heads:
        yield "model.kv_heads", f"{model.key_value_heads} key/value heads do not divide {model.heads} heads"
    if spec.engine in ("torch", "bmtrain") and model.block != "cpm9g":
        yield "model", f"its block layout is {model.block}; the trainer builds cpm9g: use engine: command for others"
    if spec.method and spec.method.rank > model.hidden:
        yield "method.lora.rank", f"{spec.method.rank} is more than the hidden size {model.hidden}"


@reads("training", "engine", "resources", "data")
def _training(spec: JobSpec) -> Iterator[Finding]:
    training = spec.training
    if spec.engine == "command":
        return
    if len(training.betas) != 2:
        yield "training.betas", f"has {len(training.betas)} numbers; AdamW takes two"
    if training.warmup_steps > training.steps:
        yield "training.warmup_steps", f"{training.warmup_steps} is more than training.steps ({training.steps})"
    if spec.engine == "torch" and training.zero_stage == 1:
        yield "training.zero_stage", "1 is not a stage of the torch engine; write 0 (DDP), 2 or 3 (FSDP)"
    if spec.engine == "bmtrain" and training.zero_stage < 2:
        yield "training.zero_stage", f"{training.zero_stage} is not a stage of BMTrain; write 2 or 3"
    if spec.engine == "torch" and training.offload_optimizer:
        yield "training.offload_optimizer", "the torch engine keeps its optimizer on the GPU; use bmtrain or deepspeed"
    if spec.engine == "bmtrain" and training.offload_optimizer and training.precision == "fp32":
        yield "training.offload_optimizer", "BMTrain's AdamOffload computes in fp16 or bf16; write one, or false here"
    if training.precision == "fp16" and spec.resources.gpus_per_node == 0:
        yield "training.precision", "fp16 with a loss scale needs GPUs; on CPUs use bf16 or fp32"
    if training.eval_every and spec.data and not spec.data.eval:
        yield "data.eval", "is missing: training.eval_every asks for evaluations; name its data"


@reads("samples.temperature", "generation")
def _temperature(spec: JobSpec) -> Iterator[Finding]:
    """Logits are divided by it: fp32 would overflow."""
    asked = {"samples.temperature": spec.samples.temperature}
    if spec.generation:
        asked["generation.temperature"] = spec.generation.temperature
    for key, temperature in asked.items():
        if 0 < temperature < COLDEST:
            yield key, f"{temperature:g} is too close to 0; write 0 for the likeliest token, or {COLDEST:g} and more"
