"""A rehearsal: the same nodes, ranks, container, environment, mounts and scripts, with a model that fits anything.

It proves the plumbing before many GPUs are spent: some steps, a checkpoint, a stop as before a time limit, and going
on from there.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Literal

from cpm_cluster.specs.job import Checkpointing, Data, Evaluation, JobSpec, Lora, Samples, Source, Training
from cpm_cluster.specs.model import Model

Stage = Literal["slurm", "sandbox", "local"]
FEWEST_STEPS, STEPS_OF_ALL_RANKS = 24, 400
PARTS = 4  # a checkpoint after each
TIME_LIMIT_S = 1800
# A tiny checkpoint takes seconds; the job's own lead may be as long as the whole rehearsal.
SIGNAL_LEAD_S = 120
# 259 ids of the tokenizer `bytes`, and a width that 64 ranks can share.
MODEL = Model(layers=2, hidden=64, heads=4, ffn=128, vocab=320, source="ours, for rehearsals")
CORPUS = "builtin:python-reference"
WITHOUT_GPUS = (
    "engine=torch",
    "training.precision=fp32",
    "training.attention=auto",
    "training.offload_optimizer=false",
)
ON_TWO_PROCESSES = (
    "cluster=local",
    "image=null",
    "runtime=null",
    "training.zero_stage=0",
    "resources.nodes=1",
    "resources.gpus_per_node=0",
    "resources.processes_per_node=2",
)


@dataclass(frozen=True)
class Rehearsal:
    """The job to run, and what it leaves open."""

    spec: JobSpec
    unproven: tuple[str, ...]


def overrides(job: JobSpec, stage: Stage) -> tuple[str, ...]:
    """What must change so that the job runs on a stage: `--set` texts, below those of the user."""
    engine = WITHOUT_GPUS if job.engine != "command" else ()
    if stage == "local":
        return (*ON_TWO_PROCESSES, *engine)
    if stage == "sandbox":
        runtime = "podman" if job.resources.nodes > 1 else "docker-rootless"
        return ("cluster=sandbox", f"runtime={runtime if job.image else 'bare'}", *engine)
    return ()


def named(job: JobSpec) -> str:
    """The name of a job's rehearsal; names have 64 characters at most."""
    return f"{job.name[:53]}-rehearsal"


def rehearse(job: JobSpec, staged: JobSpec, stage: Stage, run_dir: str, missing: Collection[str]) -> Rehearsal:
    """The staged job with a tiny model and a few steps of built-in text.

    Args:
        job: as its author wrote it.
        staged: the same with the `overrides` of the stage.
        missing: host paths of its mounts that this machine does not have; empty folders take their place.
    """
    stand_ins = {f"{run_dir}/mounts/{number}": path for number, path in enumerate(sorted(missing))}
    mounts = {host: target for host, target in staged.mounts.items() if host not in missing}
    mounts |= {stand_in: staged.mounts[path] for stand_in, path in stand_ins.items()}
    spec = replace(
        staged,
        name=named(staged),
        mounts=mounts,
        time_limit_s=TIME_LIMIT_S,
        signal_lead_s=SIGNAL_LEAD_S,
    )
    return Rehearsal(_shrunk(spec) if spec.engine != "command" else spec, _unproven(job, staged, stage, missing))


def _shrunk(spec: JobSpec) -> JobSpec:
    return replace(
        spec,
        model=MODEL,
        model_name="rehearsal",
        method=_method(spec.method),
        init_from=None,
        tokenizer="bytes",
        task="finetune",
        data=Data(train=(Source(path=CORPUS),), eval=()),
        evaluation=Evaluation(),
        generation=None,
        training=_training(spec.training, spec.resources.world_size),
        samples=Samples(),
    )


def _method(method: Lora | None) -> Lora | None:
    return None if method is None else replace(method, rank=min(method.rank, 4), alpha=8.0, dropout=0.0, init_from=None)


def _training(training: Training, ranks: int) -> Training:
    steps = max(FEWEST_STEPS, STEPS_OF_ALL_RANKS // ranks)
    return replace(
        training,
        seq_len=256,
        micro_batch=1,
        grad_accum=1,
        steps=steps,
        lr=1e-2,
        schedule="constant",
        warmup_steps=0,
        log_every=1,
        eval_every=0,
        checkpoint=Checkpointing(every=steps // PARTS, keep=2),
    )


def _unproven(job: JobSpec, staged: JobSpec, stage: Stage, missing: Collection[str]) -> tuple[str, ...]:
    found = ["that the model fits into memory, and how fast it is"]
    if stage != "slurm":
        found.append("GPUs, NCCL and InfiniBand: the ranks compute on the CPU, over gloo")
        if job.engine not in ("torch", "command"):
            found.append(f"the engine {job.engine}: torch takes its place on the CPU")
    if stage == "sandbox" and job.runtime and job.runtime != staged.runtime:
        found.append(f"the runtime {job.runtime}: {staged.runtime} takes its place here")
    if stage == "local":
        found.append("Slurm, the container, and everything between nodes: there is no cluster here, and no sandbox")
    if missing:
        found.append(f"the mounts {', '.join(sorted(missing))}: not here, empty folders take their place")
    return tuple(found)
