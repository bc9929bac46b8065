"""A rehearsal: the same nodes, ranks, container, environment, mounts and scripts, with a model that fits anything.

It proves the plumbing before many GPUs are spent: a handful of steps, one checkpoint, and going on from it.
"""

from __future__ import annotations

from dataclasses import replace

from cpm_cluster.specs.job import Checkpointing, Data, JobSpec, Lora, Samples, Training
from cpm_cluster.specs.model import Model

STEPS = 8
CHECKPOINT_EVERY = 4
TIME_LIMIT_S = 1800
# 259 ids of the tokenizer `bytes`, and a width that 64 ranks can share.
MODEL = Model(layers=2, hidden=64, heads=4, ffn=128, vocab=320, source="ours, for rehearsals")
CORPUS = "builtin:python-reference"


def rehearsed(spec: JobSpec) -> JobSpec:
    """The job with a tiny model and a few steps of built-in text; all that Slurm and the container see stays."""
    if spec.engine == "command":
        return replace(spec, name=_name(spec))
    on_cpu = computes_on_cpu(spec)
    return replace(
        spec,
        name=_name(spec),
        model=MODEL,
        model_name="rehearsal",
        method=_method(spec.method),
        init_from=None,
        tokenizer="bytes",
        engine="torch" if on_cpu else spec.engine,
        data=Data(train=(CORPUS,), eval=()),
        training=_training(spec.training, on_cpu),
        samples=Samples(),
        time_limit_s=min(spec.time_limit_s or TIME_LIMIT_S, TIME_LIMIT_S),
    )


def unproven(spec: JobSpec) -> list[str]:
    """What a rehearsal of this job leaves open."""
    found = ["that the model fits into memory, and how fast it is"]
    if computes_on_cpu(spec):
        found.append("GPUs, NCCL and InfiniBand: the ranks compute on the CPU, over gloo")
        if spec.engine not in ("torch", "command"):
            found.append(f"the engine {spec.engine}: torch takes its place on the CPU")
    if spec.cluster.scheduler == "local":
        found.append("Slurm, the container, and everything between nodes: there is no cluster here")
    return found


def computes_on_cpu(spec: JobSpec) -> bool:
    """Whether the ranks will see no GPU."""
    return spec.cluster.pretend_gpus or spec.resources.gpus_per_node == 0


def _name(spec: JobSpec) -> str:
    return f"{spec.name[:53]}-rehearsal"


def _method(method: Lora | None) -> Lora | None:
    return None if method is None else replace(method, rank=min(method.rank, 4), alpha=8.0, dropout=0.0)


def _training(training: Training, on_cpu: bool) -> Training:
    return replace(
        training,
        seq_len=64,
        micro_batch=1,
        grad_accum=1,
        steps=STEPS,
        lr=1e-2,
        schedule="constant",
        warmup_steps=0,
        precision="fp32" if on_cpu else training.precision,
        attention="auto" if on_cpu else training.attention,
        offload_optimizer=False if on_cpu else training.offload_optimizer,
        log_every=1,
        eval_every=0,
        checkpoint=Checkpointing(every=CHECKPOINT_EVERY, keep=2),
    )
