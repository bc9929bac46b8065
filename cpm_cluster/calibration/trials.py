"""Short runs that a calibration is made from: a job's own model in width, image, GPUs and engine, of three sizes.

Weights and states grow with the layers, activations with the micro batch, and what is in neither is constant: three
runs that vary both tell them apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from cpm_cluster.planner import cpu
from cpm_cluster.planner.fit import Fit
from cpm_cluster.planner.job_setup import job_setup
from cpm_cluster.planner.step_time import step_time
from cpm_cluster.specs.job import Checkpointing, Data, Evaluation, JobSpec, Samples, Source, Training
from cpm_cluster.specs.model import Model

Judge = Callable[[JobSpec], Fit]
CORPUS = "builtin:python-reference"
BYTES = 320  # ids that the tokenizer `bytes` needs at most
PARAMETERS = 1_000_000_000  # in the blocks of the smallest: read, spread and written in seconds
# The agents take a sample every 10 s; a median of speeds needs some steps after the first.
SECONDS, FEWEST_STEPS, MOST_STEPS = 40.0, 16, 2000
TIME_LIMIT_S, SIGNAL_LEAD_S = 900, 60
SHORTEST = 128  # tokens


class NoTrial(ValueError):
    """The job can't be calibrated by short runs; the message says why."""


@dataclass(frozen=True)
class Trial:
    """A job to run, and what is particular to it."""

    spec: JobSpec
    what: str


def trials(job: JobSpec, judge: Judge) -> tuple[Trial, ...]:
    """Three of them, as close to the job as surely fit on one node.

    Raises:
        NoTrial: the job is no training of ours, its GPUs are pretended, or not even the smallest fits.
    """
    if job.engine == "command" or job.model is None:
        raise NoTrial("engine command: its program is its own, cpm calibrate trains with engines of cpm-cluster")
    if job.resources.gpus_per_node and job.cluster.pretend_gpus:
        raise NoTrial(f"the GPUs of {job.cluster_name} are pretended: nothing measured there holds elsewhere")
    if job.resources.gpus_per_node and job.gpu is None:
        raise NoTrial("the type of GPU is not known: name it (resources.gpu, or the cluster's gpu)")
    for seq_len, micro_batch in _smaller_and_smaller(job.training):
        found = tuple(_three(job, job.model, seq_len, micro_batch))
        if all(judge(trial.spec).verdict in ("fits", "capacity unknown") for trial in found):
            return found
    raise NoTrial("not even a few layers of its model, with one short sequence, surely fit on one node")


def _smaller_and_smaller(training: Training) -> Iterator[tuple[int, int]]:
    """(sequence length, micro batch): the batch is halved first, for lengths decide what kernels do."""
    seq_len, micro_batch = training.seq_len, training.micro_batch
    yield seq_len, micro_batch
    while micro_batch > 1 or seq_len > SHORTEST:
        seq_len, micro_batch = (seq_len, micro_batch // 2) if micro_batch > 1 else (max(SHORTEST, seq_len // 2), 1)
        yield seq_len, micro_batch


def _three(job: JobSpec, model: Model, seq_len: int, micro_batch: int) -> Iterator[Trial]:
    setup = job_setup(job)
    per_layer = setup.shape.parameters_per_layer if setup else 1
    few = max(1, min(model.layers // 2, PARAMETERS // max(1, per_layer)))
    for layers, sequences in ((few, micro_batch), (2 * few, micro_batch), (few, 2 * micro_batch)):
        what = f"{layers} of {model.layers} layers, micro batch {sequences}, {seq_len} tokens"
        yield Trial(_trial(job, replace(model, layers=layers), seq_len, sequences), what)


def _trial(job: JobSpec, model: Model, seq_len: int, micro_batch: int) -> JobSpec:
    training = replace(
        job.training,
        seq_len=seq_len,
        micro_batch=micro_batch,
        grad_accum=1,
        schedule="constant",
        warmup_steps=0,
        log_every=1,
        eval_every=0,
    )
    spec = replace(
        job,
        name=f"{job.name[:51]}-calibration",
        model=model,
        resources=replace(job.resources, nodes=1),
        slurm=replace(job.slurm, nodelist=job.slurm.nodelist if job.resources.nodes == 1 else None),
        method=replace(job.method, init_from=None) if job.method else None,
        init_from=None,
        tokenizer="bytes" if model.vocab >= BYTES else job.tokenizer,
        task="finetune",
        data=Data(train=(Source(path=CORPUS),)),
        evaluation=Evaluation(),
        generation=None,
        training=training,
        samples=Samples(),
        time_limit_s=TIME_LIMIT_S,
        signal_lead_s=SIGNAL_LEAD_S,
    )
    steps = _steps(spec)
    return replace(spec, training=replace(training, steps=steps, checkpoint=Checkpointing(every=steps, keep=1)))


def _steps(spec: JobSpec) -> int:
    """As many as are planned to take long enough to be measured."""
    setup = job_setup(spec)
    assert setup is not None  # a training of ours
    step = step_time(setup, spec.gpu) if spec.resources.gpus_per_node else cpu.step_time(setup)
    return min(MOST_STEPS, max(FEWEST_STEPS, round(SECONDS / step.seconds)))
