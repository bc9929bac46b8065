"""The terms of a prediction by what calibration scales: four groups of GPU memory, two of host memory, three of time.

What a part of GPU memory consists of is found by asking the model again: what grows with the micro batch are
activations, what shrinks with the data-parallel ranks is sharded, and the rest of what torch allocates is there whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from cpm_cluster.planner.fit import Component
from cpm_cluster.planner.gpu_memory import STAGING, GpuMemory, Instant
from cpm_cluster.planner.host_memory import HostInstant
from cpm_cluster.planner.least_squares import Vector
from cpm_cluster.planner.setup import Setup
from cpm_cluster.planner.step_time import StepTime, TimeTerm

GpuModel = Callable[[Setup], GpuMemory]

GPU_GROUPS = ("whole", "sharded", "activations", "constant")
HOST_GROUPS = ("processes", "tensors")
TIME_GROUPS = ("compute", "transfer", "cpu_optimizer")

_HOST_PROCESSES = ("system", "processes")
_TRANSFERS = (
    "tensor parallel",
    "sharded weights",
    "pipeline transfers",
    "weights from the host",
    "gradients",
    "gradients to the host",
)
_CPU_OPTIMIZER = ("optimizer on the CPU",)


@dataclass(frozen=True)
class Grouped:
    """An instant of GPU memory, and the bytes of each group in each of its components."""

    instant: Instant
    shares: tuple[Vector, ...]

    @property
    def sums(self) -> Vector:
        return tuple(map(sum, zip(*self.shares, strict=True)))

    def scaled(self, multipliers: Sequence[float]) -> Instant:
        """The instant with its components multiplied, which their formulas say."""
        sizes = [sum(m * x for m, x in zip(multipliers, share, strict=True)) for share in self.shares]
        found = iter([_resized(c, size) for c, size in zip(self.instant.components, sizes, strict=True)])

        def next_ones(parts: tuple[Component, ...]) -> tuple[Component, ...]:
            return tuple(next(found) for _ in parts)

        of = self.instant
        return replace(
            of,
            outside=next_ones(of.outside),
            lasting=next_ones(of.lasting),
            passing=next_ones(of.passing),
            wasted=next_ones(of.wasted),
        )


def gpu_groups(setup: Setup, model: GpuModel) -> tuple[Grouped, ...]:
    """The instants of a setup, each in groups."""
    of_one = model(setup).instants
    of_twice = model(replace(setup, micro_batch=2 * setup.micro_batch)).instants
    of_more_ranks = model(replace(setup, dp=2 * setup.dp)).instants
    return tuple(map(_grouped, of_one, of_twice, of_more_ranks))


def lasts(instant: Instant) -> bool:
    """Whether nvidia-smi shows it during training."""
    return instant.name.partition(",")[0] != STAGING


def _grouped(one: Instant, twice: Instant, more_ranks: Instant) -> Grouped:
    shares = [(0.0, 0.0, 0.0, float(component.bytes)) for component in one.outside]
    for component, larger, smaller in zip(_inside(one), _inside(twice), _inside(more_ranks), strict=True):
        size = component.bytes
        activations = min(size, max(0, larger.bytes - size))
        sharded = min(size - activations, max(0, 2 * (size - smaller.bytes)))
        shares.append((float(size - activations - sharded), float(sharded), float(activations), 0.0))
    return Grouped(one, tuple(shares))


def _inside(instant: Instant) -> tuple[Component, ...]:
    """What torch allocates."""
    return (*instant.lasting, *instant.passing, *instant.wasted)


def _resized(component: Component, size: float) -> Component:
    if not component.bytes or round(size) == component.bytes:
        return component
    formula = f"{component.formula}, × {size / component.bytes:.2f} calibrated"
    return replace(component, bytes=round(size), formula=formula)


def host_groups(instant: HostInstant) -> Vector:
    """Bytes of what each process needs, and of the tensors that it holds."""
    processes = sum(c.bytes for c in instant.components if c.name in _HOST_PROCESSES)
    return float(processes), float(instant.bytes - processes)


def scaled_host(instant: HostInstant, multipliers: Sequence[float]) -> HostInstant:
    processes, tensors = multipliers
    found = (_resized(c, c.bytes * (processes if c.name in _HOST_PROCESSES else tensors)) for c in instant.components)
    return replace(instant, components=tuple(found))


def time_groups(step: StepTime) -> Vector:
    """Seconds by group."""
    seconds = [0.0, 0.0, 0.0]
    for term in step.terms:
        seconds[_time_group(term)] += term.seconds
    return tuple(seconds)


def scaled_terms(step: StepTime, multipliers: Sequence[float]) -> tuple[TimeTerm, ...]:
    return tuple(_resized_time(term, multipliers[_time_group(term)]) for term in step.terms)


def _time_group(term: TimeTerm) -> int:
    """Waiting for other GPUs, in a pipeline or at a barrier, is a part of what those compute."""
    return 2 if term.name in _CPU_OPTIMIZER else 1 if term.name in _TRANSFERS else 0


def _resized_time(term: TimeTerm, multiplier: float) -> TimeTerm:
    formula = f"{term.formula}, × {multiplier:.2f} calibrated"
    return replace(term, seconds=term.seconds * multiplier, formula=formula)
