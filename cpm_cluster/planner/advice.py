"""The cheapest changes that make a job fit, found by planning the jobs next to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from cpm_cluster.planner.fit import Advice, Fit, Verdict
from cpm_cluster.specs.checks import is_possible
from cpm_cluster.specs.job import JobSpec, Lora, Training
from cpm_cluster.specs.values import format_duration, format_size

Judge = Callable[[JobSpec], Fit]
AT_ONCE = 3  # changes that are proposed together, where fewer don't do
SHOWN = 4
SOUND: tuple[Verdict, ...] = ("fits", "capacity unknown")  # the latter where a cluster doesn't state its host memory
NODES_OF_UNKNOWN_CLUSTER = 64
LONGEST_S = 7 * 86_400  # a time limit, where a partition states none
SHORTEST = 512  # tokens
CHANGES_THE_TRAINING = {"method", "sequence"}  # not only how it is computed
TRAINING = ("seq_len", "micro_batch", "grad_accum", "steps", "recompute", "zero_stage", "offload_optimizer")
CHANGED = {  # sections of a job, their fields, and the keys of these
    "resources": {"nodes": "nodes", "gpus_per_node": "gpus_per_node", "memory_per_node_bytes": "memory_per_node"},
    "training": dict(zip(TRAINING, TRAINING, strict=True)),
}


@dataclass(frozen=True)
class Change:
    """One change of a job. Of several of a kind the earlier changes less."""

    kind: str
    text: str
    apply: Callable[[JobSpec], JobSpec]


@dataclass(frozen=True)
class _Outcome:
    changes: tuple[Change, ...]
    spec: JobSpec
    fit: Fit


def advise(spec: JobSpec, fit: Fit, judge: Judge) -> tuple[Advice, ...]:
    """What makes a job fit that doesn't, or surely fit: as few changes as do, the cheapest first."""
    known = list(changes(spec))
    tight: list[_Outcome] = []
    for count in range(1, AT_ONCE + 1):
        tried = list(_outcomes(spec, known, count, judge))
        if found := [outcome for outcome in tried if outcome.fit.verdict in SOUND]:
            return _told(spec, fit, found)
        if fit.does_not_fit:
            tight = tight or [outcome for outcome in tried if outcome.fit.verdict == "tight"]
    return _told(spec, fit, tight)


def _outcomes(spec: JobSpec, known: list[Change], count: int, judge: Judge) -> Iterator[_Outcome]:
    for chosen in combinations(known, count):
        if len({change.kind for change in chosen}) < count:
            continue
        changed = spec
        for change in chosen:
            changed = change.apply(changed)
        if is_possible(changed):
            yield _Outcome(chosen, changed, judge(changed))


def _told(spec: JobSpec, before: Fit, found: list[_Outcome]) -> tuple[Advice, ...]:
    """The least change of each kind; what is trained changes last."""
    least: dict[tuple[str, ...], _Outcome] = {}
    for outcome in found:
        least.setdefault(tuple(change.kind for change in outcome.changes), outcome)
    ranked = sorted(least.values(), key=_order)
    return tuple(
        Advice(
            ", ".join(change.text for change in outcome.changes),
            overrides(spec, outcome.spec),
            _effect(before, outcome.fit),
            outcome.fit.verdict,
        )
        for outcome in ranked[:SHOWN]
    )


def overrides(before: JobSpec, after: JobSpec) -> tuple[str, ...]:
    """The `--set` texts that make the one job the other, as far as the planner changes jobs."""
    written = []
    if after.method != before.method and after.method is not None:
        written.append(f"method.lora.rank={after.method.rank}" if before.method else "method=lora")
    if after.time_limit_s != before.time_limit_s:
        written.append(f"time_limit={after.time_limit_s}s")
    for section, names in CHANGED.items():
        for name, key in names.items():
            was, now = (getattr(getattr(job, section), name) for job in (before, after))
            if was != now:
                written.append(f"{section}.{key}={str(now).lower()}" + ("B" if name.endswith("_bytes") else ""))
    return tuple(written)


def _order(outcome: _Outcome) -> tuple[bool, float]:
    other = any(change.kind in CHANGES_THE_TRAINING for change in outcome.changes)
    return other, _price(outcome.fit)


def _price(fit: Fit) -> float:
    """GPU seconds for each token: what the same training costs, however long it takes."""
    step = fit.time.step if fit.time else None
    return step.seconds * step.gpus / step.tokens if step else 0.0


def _effect(before: Fit, after: Fit) -> str:
    """`GPU memory −31 GiB, +33 % time, the same price`; for as many tokens where a run of the change has others."""
    parts = []
    for was, now in zip(before.demands, after.demands, strict=False):
        if was.resource == now.resource and was.resource in ("GPU memory", "host memory"):
            change = now.bytes - was.bytes
            if abs(change) > was.bytes // 100:
                parts.append(f"{was.resource} {'−' if change < 0 else '+'}{format_size(abs(change))}")
    if before.time and after.time:
        speed = [time.step.seconds / time.step.tokens for time in (before.time, after.time)]
        parts.append(f"{_percent(speed[1] / speed[0])} time")
        trained = [time.step.tokens * time.steps for time in (before.time, after.time)]
        per = "" if trained[0] == trained[1] else " for as many tokens"
        parts.append(f"{_percent(_price(after) / _price(before))} price{per}")
    return ", ".join(parts) or "no other cost"


def _percent(ratio: float) -> str:
    change = round(100 * (ratio - 1))
    return "the same" if change == 0 else f"{'−' if change < 0 else '+'}{abs(change)} %"


def changes(spec: JobSpec) -> Iterator[Change]:
    """What can be changed of a job, whether it helps or not."""
    yield from _smaller_micro_batches(spec)
    yield from _recomputation(spec)
    yield from _sharding(spec)
    yield from _offloading(spec)
    yield from _more_memory(spec)
    yield from _more_gpus(spec)
    yield from _more_nodes(spec)
    yield from _more_time(spec)
    yield from _shorter_sequences(spec)
    yield from _adapters(spec)


def _smaller_micro_batches(spec: JobSpec) -> Iterator[Change]:
    whole, size = spec.training.micro_batch * spec.training.grad_accum, spec.training.micro_batch // 2
    while size >= 1:
        if whole % size == 0:
            accumulated = whole // size
            text = f"micro batch {spec.training.micro_batch} → {size}"
            yield _training("micro batch", text, micro_batch=size, grad_accum=accumulated)
        size //= 2


def _recomputation(spec: JobSpec) -> Iterator[Change]:
    if spec.training.recompute == "none":
        yield _training("recompute", "recompute: full", recompute="full")


def _sharding(spec: JobSpec) -> Iterator[Change]:
    for stage in range(spec.training.zero_stage + 1, 4):
        yield _training("sharding", f"ZeRO stage {spec.training.zero_stage} → {stage}", zero_stage=stage)


def _offloading(spec: JobSpec) -> Iterator[Change]:
    offload = not spec.training.offload_optimizer
    text = "optimizer on the CPU" if offload else "optimizer on the GPU"
    yield _training("offload", text, offload_optimizer=offload)


def _more_memory(spec: JobSpec) -> Iterator[Change]:
    """All that a node of the cluster has."""
    most, asked = spec.cluster.memory_per_node_bytes, spec.resources.memory_per_node_bytes
    if most is not None and asked is not None and most > asked:
        text = f"{format_size(most)} of host memory instead of {format_size(asked)}"
        yield Change(
            "memory", text, lambda job: replace(job, resources=replace(job.resources, memory_per_node_bytes=most))
        )


def _more_gpus(spec: JobSpec) -> Iterator[Change]:
    """On the same node."""
    now, most = spec.resources.gpus_per_node, spec.cluster.gpus_per_node or spec.resources.gpus_per_node
    count = 2 * now
    while 0 < count <= most:
        yield _wider(spec, count // now, f"{count * spec.resources.nodes} GPUs", gpus_per_node=count)
        count *= 2


def _more_nodes(spec: JobSpec) -> Iterator[Change]:
    now, gpus = spec.resources.nodes, spec.resources.gpus_per_node
    count = 2 * now
    while gpus and count <= most_nodes(spec):
        yield _wider(spec, count // now, f"{count * gpus} GPUs", nodes=count)
        count *= 2


def most_nodes(spec: JobSpec) -> int:
    """Of the cluster and the job's partition."""
    partition = spec.cluster.partitions.get(spec.slurm.partition or "")
    known = [spec.cluster.nodes, partition.nodes if partition else None]
    if spec.cluster.scheduler == "local":
        return 1
    return min((count for count in known if count is not None), default=NODES_OF_UNKNOWN_CLUSTER)


def _more_time(spec: JobSpec) -> Iterator[Change]:
    """As long as the partition allows, where it says so."""
    partition = spec.cluster.partitions.get(spec.slurm.partition or "")
    most = (partition and partition.max_time_s) or LONGEST_S
    limit = 2 * (spec.time_limit_s or most)
    while limit <= most:
        text = f"time limit {format_duration(limit)} instead of {format_duration(spec.time_limit_s or 0)}"
        yield Change("time limit", text, _with_time_limit(limit))
        limit *= 2


def _with_time_limit(limit_s: int) -> Callable[[JobSpec], JobSpec]:
    return lambda job: replace(job, time_limit_s=limit_s)


def _shorter_sequences(spec: JobSpec) -> Iterator[Change]:
    length = spec.training.seq_len // 2
    while length >= SHORTEST:
        yield _training("sequence", f"sequences of {length} tokens instead of {spec.training.seq_len}", seq_len=length)
        length //= 2


def _adapters(spec: JobSpec) -> Iterator[Change]:
    if spec.method is None:
        yield Change("method", "LoRA instead of full tuning", lambda job: replace(job, method=Lora()))


def _training(kind: str, text: str, **values: Any) -> Change:
    def apply(spec: JobSpec) -> JobSpec:
        return replace(spec, training=replace(spec.training, **values))

    return Change(kind, text, apply)


def _wider(spec: JobSpec, times: int, gpus: str, **values: Any) -> Change:
    """More GPUs; each accumulates less where the batch stays the same by it."""
    now = spec.resources.nodes * spec.resources.gpus_per_node

    def less(training: Training) -> Training:
        whole = training.grad_accum % times == 0
        return replace(training, grad_accum=training.grad_accum // times) if whole else training

    def apply(job: JobSpec) -> JobSpec:
        return replace(job, resources=replace(job.resources, **values), training=less(job.training))

    same = less(spec.training) != spec.training
    text = f"{gpus} instead of {now}" + ("" if same else f" (and a batch {times} times as large)")
    return Change("GPUs", text, apply)
