"""Which configurations of a job are worth running: those that no other one beats in time, price and GPUs.

The search keeps the model, the method and the tokens of the job, and the sequences of a step to within an eighth. It
varies nodes and GPUs within the cluster's partition, micro batch with accumulation, ZeRO stage, offloading,
recomputation and the rank of LoRA.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

from cpm_cluster.planner.advice import most_nodes, overrides
from cpm_cluster.planner.calibration import Calibration, calibrated_time
from cpm_cluster.planner.cost import cost
from cpm_cluster.planner.demands import card_memory, gpu_demand, host_demand
from cpm_cluster.planner.job_setup import host_capacity, job_setup
from cpm_cluster.planner.memory_constants import MIB
from cpm_cluster.planner.setup import Setup
from cpm_cluster.planner.step_time import step_time
from cpm_cluster.specs.checks import is_possible
from cpm_cluster.specs.job import JobSpec

Objective = Literal["time", "cost", "gpus"]
MICRO_BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
RANKS = (8, 16, 32, 64, 128)
STAGES = {"bmtrain": (2, 3), "torch": (0, 3), "deepspeed": (0, 1, 2, 3)}
EVERY_NODE_UP_TO = 8  # then in steps of about 1.5
BATCH_WITHIN = 1 / 8
AS_FAST = 1.01  # of two that are, the one that needs less memory is taken


class NoSuggestion(ValueError):
    """A job that nothing can be suggested for: says why."""


@dataclass(frozen=True)
class Option:
    """One configuration that fits, for the whole run."""

    overrides: tuple[str, ...]
    nodes: int
    gpus: int
    micro_batch: int
    grad_accum: int
    zero_stage: int
    offload_optimizer: bool
    recompute: str
    lora_rank: int  # 0: full tuning
    steps: int
    gpu_bytes: int
    gpu_high_bytes: int
    seconds: float
    gpu_hours: float
    price_usd: float | None


@dataclass(frozen=True)
class Suggestions:
    """The Pareto set, the best by the objective first. `considered` has also what a smaller micro batch rules out."""

    considered: int
    planned: int
    options: tuple[Option, ...]


@dataclass(frozen=True)
class _Candidate:
    spec: JobSpec
    setup: Setup
    gpu_high_bytes: int
    seconds_per_token: float

    @property
    def group(self) -> tuple[int, int]:
        return self.setup.gpus, self.setup.lora_rank


def suggest(
    spec: JobSpec, gpus: int | None = None, objective: Objective = "time", calibration: Calibration | None = None
) -> Suggestions:
    """Search the neighbourhood of a job; `gpus` asks for exactly so many.

    Raises:
        NoSuggestion: no engine of ours computes it, its GPU is not known, or no placement has so many GPUs.
    """
    if spec.engine == "command" or job_setup(spec) is None or spec.gpu is None or not spec.resources.gpus_per_node:
        raise NoSuggestion("nothing can be suggested for a job without a model, an engine of ours and a known GPU")
    places = list(_placements(spec, gpus))
    if not places:
        raise NoSuggestion(f"no placement on {spec.cluster_name} has {gpus} GPUs; it has {_sizes(spec)}")
    considered = planned = 0
    best: dict[tuple[int, int], list[_Candidate]] = {}
    for variant in (variant for place in places for variant in _variants(place)):
        for setups in _setups(spec, variant):
            considered += len(setups)
            for candidate in _planned(variant, setups, calibration):
                planned += 1
                if candidate is not None:
                    best.setdefault(candidate.group, []).append(candidate)
    options = [_option(spec, _safest(group), calibration) for group in best.values()]
    return Suggestions(considered, planned, tuple(sorted(_pareto(options), key=lambda one: _rank(one, objective))))


def _setups(spec: JobSpec, variant: JobSpec) -> Iterator[list[Setup]]:
    """For each rank of LoRA, by micro batch, the smallest first."""
    base = job_setup(variant)
    if base is None or not is_possible(variant):
        return
    sizes = list(_micro_batches(spec, base))
    for rank in _ranks(spec):
        yield [replace(base, micro_batch=micro, grad_accum=count, lora_rank=rank) for micro, count in sizes]


def _planned(spec: JobSpec, setups: list[Setup], calibration: Calibration | None) -> Iterator[_Candidate | None]:
    """None for what does not surely fit; what is larger in nothing but its micro batch is left out then."""
    too_large = set()
    for setup in setups:
        if setup.accumulates in too_large:
            continue
        high = card_memory(setup, calibration).high
        host = host_demand(setup, host_capacity(spec), spec.engine != "command", calibration).verdict
        if high > setup.gpu_memory_mib * MIB or host in ("tight", "does not fit"):
            too_large.add(setup.accumulates)
            yield None
        else:
            step = calibrated_time(calibration, setup, step_time(setup, spec.gpu))
            yield _Candidate(spec, setup, high, step.seconds / step.tokens)


def _placements(spec: JobSpec, gpus: int | None) -> Iterator[JobSpec]:
    whole = spec.cluster.gpus_per_node or spec.resources.gpus_per_node
    counts = [(1, count) for count in (1, 2, 4, 8, 16, 32) if count < whole]
    counts += [(nodes, whole) for nodes in _nodes(most_nodes(spec))]
    for nodes, each in counts:
        if gpus in (None, nodes * each):
            resources = replace(spec.resources, nodes=nodes, gpus_per_node=each)
            yield replace(spec, resources=resources)


def _nodes(most: int) -> Iterator[int]:
    count = 1
    while count <= most:
        yield count
        count = count + 1 if count < EVERY_NODE_UP_TO else round(count * 1.5)


def _sizes(spec: JobSpec) -> str:
    sizes = sorted({place.resources.nodes * place.resources.gpus_per_node for place in _placements(spec, None)})
    return ", ".join(map(str, sizes))


def _variants(spec: JobSpec) -> Iterator[JobSpec]:
    """The job's own values come first, and of two that are the same to the engine only the first is taken."""
    own, seen = spec.training, set()
    offloads = (False, True) if spec.engine in ("bmtrain", "deepspeed") else (False,)
    stages = STAGES[spec.engine]
    for stage, offload, recompute in product(
        sorted(stages, key=lambda stage: stage != own.zero_stage),
        sorted(offloads, key=lambda offload: offload != own.offload_optimizer),
        sorted(("none", "full"), key=lambda recompute: recompute != own.recompute),
    ):
        training = replace(own, zero_stage=stage, offload_optimizer=offload, recompute=recompute)
        variant = replace(spec, training=training)
        setup = job_setup(variant)
        if setup not in seen:  # BMTrain before 1.0 recomputes in any case
            seen.add(setup)
            yield variant


def _ranks(spec: JobSpec) -> list[int]:
    """An adapter that the job begins with has its rank already."""
    if spec.method is None:
        return [0]
    return [spec.method.rank] if spec.method.init_from else sorted({*RANKS, spec.method.rank})


def _micro_batches(spec: JobSpec, setup: Setup) -> Iterator[tuple[int, int]]:
    """(micro batch, accumulation) with about as many sequences in a step as the job has."""
    wanted = spec.training.micro_batch * spec.training.grad_accum * spec.resources.world_size
    for micro in sorted({*MICRO_BATCHES, spec.training.micro_batch}):
        accumulated = max(1, round(wanted / (micro * setup.dp)))
        if abs(micro * setup.dp * accumulated / wanted - 1) <= BATCH_WITHIN:
            yield micro, accumulated


def _safest(group: list[_Candidate]) -> _Candidate:
    fastest = min(candidate.seconds_per_token for candidate in group)
    as_fast = (candidate for candidate in group if candidate.seconds_per_token <= AS_FAST * fastest)
    return min(as_fast, key=lambda candidate: candidate.gpu_high_bytes)


def _option(spec: JobSpec, candidate: _Candidate, calibration: Calibration | None) -> Option:
    setup, place = candidate.setup, candidate.spec
    tokens = spec.training.micro_batch * spec.training.grad_accum * spec.resources.world_size * setup.seq_len
    of_a_step = setup.micro_batch * setup.grad_accum * setup.dp * setup.seq_len
    steps = -(-spec.training.steps * tokens // of_a_step)
    training = replace(place.training, micro_batch=setup.micro_batch, grad_accum=setup.grad_accum, steps=steps)
    method = replace(spec.method, rank=setup.lora_rank) if spec.method else None
    step = calibrated_time(calibration, setup, step_time(setup, spec.gpu))
    spent = cost(setup, step, steps, spec.gpu, spec.cluster.gpu_price_per_hour_usd)
    return Option(
        overrides=overrides(spec, replace(place, training=training, method=method)),
        nodes=setup.nodes,
        gpus=setup.gpus,
        micro_batch=setup.micro_batch,
        grad_accum=setup.grad_accum,
        zero_stage=training.zero_stage,
        offload_optimizer=setup.offload_optimizer,
        recompute=training.recompute,
        lora_rank=setup.lora_rank,
        steps=steps,
        gpu_bytes=gpu_demand(setup, calibration).bytes,
        gpu_high_bytes=candidate.gpu_high_bytes,
        seconds=spent.seconds.value,
        gpu_hours=spent.gpu_hours.value,
        price_usd=spent.price_usd.value if spent.price_usd else None,
    )


def _pareto(options: list[Option]) -> list[Option]:
    """A higher rank of LoRA is a gain, too."""

    def better(one: Option, other: Option) -> bool:
        ours = (one.seconds, one.gpu_hours, one.gpus, -one.lora_rank)
        theirs = (other.seconds, other.gpu_hours, other.gpus, -other.lora_rank)
        return ours != theirs and all(mine <= yours for mine, yours in zip(ours, theirs, strict=True))

    return [one for one in options if not any(better(other, one) for other in options)]


def _rank(option: Option, objective: Objective) -> tuple[float, ...]:
    """Times and prices within a percent count as the same; of these the higher rank of LoRA comes first."""
    time, price = (round(math.log(value, AS_FAST)) for value in (option.seconds, option.gpu_hours))
    by = {"time": (time, price), "cost": (price, time), "gpus": (option.gpus, time)}
    return (*by[objective], -option.lora_rank, option.seconds)
