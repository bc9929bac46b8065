"""Calibration: how the planner's terms are scaled for one image, type of GPU and engine, as runs there were measured.

Four multipliers for GPU memory (weights and states that are whole, those that are sharded, activations, and the
constant outside torch), two for host memory, three for time (computing, transfers, the optimizer on the CPU). Each is
drawn towards 1, so that one run moves only what it tells of; see `least_squares.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from cpm_cluster.planner.gpu_memory import LASTING, GpuMemory, Instant
from cpm_cluster.planner.host_memory import SPREAD as HOST_SPREAD
from cpm_cluster.planner.host_memory import HostInstant
from cpm_cluster.planner.least_squares import Matrix, Solution, Vector
from cpm_cluster.planner.setup import Setup
from cpm_cluster.planner.step_time import StepTime
from cpm_cluster.planner.term_groups import (
    GPU_GROUPS,
    GpuModel,
    gpu_groups,
    host_groups,
    scaled_host,
    scaled_terms,
    time_groups,
)

# Standard deviations that are expected of the logarithms of the multipliers, before any run. Bytes of weights and
# states are counted; the rest are what left-out halves of measured_runs.csv bear out, see test_calibration_held_out.py.
GPU_EXPECTED = (LASTING, LASTING, 0.2, 0.2)
HOST_EXPECTED = (0.3, 0.05)
TIME_EXPECTED = (0.12, 0.5, math.log(4))  # the CPU's rate is a guess: published ones differ by a factor of 7
# What a run is expected to be off besides, as a part of the prediction.
GPU_NOISE, HOST_NOISE, TIME_NOISE = 0.06, 0.08, 0.08
# Runs that tell a quantity's terms apart; fewer may make the plans of other configurations worse.
ENOUGH = 3
# Standard deviations to either side: 95 % of Student's t with 4 degrees of freedom.
SIDE = 2.78


@dataclass(frozen=True)
class Subject:
    """What a calibration is of: image (empty without one), GPU as in gpus.yaml or `cpu`, engine as a Setup names it."""

    image: str
    gpu: str
    engine: str

    def __str__(self) -> str:
        return f"{self.engine} on {self.gpu}, " + (f"image {self.image}" if self.image else "no image")


@dataclass(frozen=True)
class Scaling:
    """Of one quantity. `residual` is what the runs are off with it, root mean square, as a part of the prediction."""

    multipliers: Vector
    covariance: Matrix  # of their logarithms
    noise: float
    residual: float
    runs: int

    def deviation(self, scaled: Sequence[float]) -> float:
        """Standard deviation of the logarithm of a prediction, by its scaled terms."""
        return Solution((), self.covariance, self.noise).deviation(scaled)


@dataclass(frozen=True)
class Calibration:
    """The multipliers, and where they are from. None: no run told of that quantity."""

    subject: Subject
    modes: tuple[str, ...]  # full, lora: of the runs
    runs: tuple[str, ...]
    date: str  # 2026-01-31
    version: str  # of cpm-cluster
    gpu_memory: Scaling | None = None
    host_memory: Scaling | None = None
    step_time: Scaling | None = None

    @property
    def note(self) -> str:
        """For the answer: from what, when, and how well it agrees."""
        told = [
            f"{name} within {scaling.residual:.0%}"
            for name, scaling in (
                ("GPU memory", self.gpu_memory),
                ("host memory", self.host_memory),
                ("speed", self.step_time),
            )
            if scaling
        ]
        count = f"{len(self.runs)} {'run' if len(self.runs) == 1 else 'runs'}"
        few = "" if self.is_enough else "; so few may make plans of other configurations worse"
        whole = f"{count} ({', '.join(self.modes)}) of {self.subject}, {self.date}"
        return f"calibrated on {whole}: {', '.join(told)}{few}"

    @property
    def is_enough(self) -> bool:
        return len(self.runs) >= ENOUGH

    def is_of(self, setup: Setup) -> bool:
        """A change of a job may lead to another engine, for which these multipliers say nothing."""
        return (self.subject.gpu, self.subject.engine) == (setup.gpu, setup.engine)

    def narrows(self, scaling: Scaling, expected_noise: float, setup: Setup) -> bool:
        """Whether an interval may become smaller: runs of the same mode agreed as well as was expected, or better."""
        return setup.mode in self.modes and scaling.noise <= expected_noise


@dataclass(frozen=True)
class CalibratedMemory(GpuMemory):
    """`bounds` are the low and the high end, bytes."""

    bounds: tuple[int, int]

    @property
    def low(self) -> int:
        return self.bounds[0]

    @property
    def high(self) -> int:
        return self.bounds[1]


def calibrated_gpu(calibration: Calibration | None, setup: Setup, model: GpuModel) -> GpuMemory:
    """What `model` says of a setup, with its terms scaled; just that where nothing is calibrated."""
    if calibration is None or calibration.gpu_memory is None or not calibration.is_of(setup):
        return model(setup)
    scaling = calibration.gpu_memory
    narrows = calibration.narrows(scaling, GPU_NOISE, setup)
    instants: list[Instant] = []
    bounds: list[tuple[float, float]] = []
    for grouped in gpu_groups(setup, model):
        scaled = grouped.scaled(scaling.multipliers)
        terms = [m * x for m, x in zip(scaling.multipliers, grouped.sums, strict=True)]
        side = math.exp(SIDE * scaling.deviation(terms))
        scaled = replace(scaled, unsure=_still_unsure(scaled, scaling))
        own = (scaled.low, scaled.high)
        found = (scaled.bytes / side, scaled.bytes * side + scaled.unsure)
        instants.append(scaled)
        # Stages and groups of a pipeline differ from setup to setup: other runs make no bound of it surer.
        surer = narrows and not scaled.spread
        bounds.append(_narrower(own, found) if surer else _wider(own, found, grouped.instant))
    low, high = (round(max(ends)) for ends in zip(*bounds, strict=True))
    return CalibratedMemory(tuple(instants), (low, high))


def _still_unsure(scaled: Instant, scaling: Scaling) -> int:
    """What may come on top depends on the activations: it is as unsure as they are."""
    group = GPU_GROUPS.index("activations")
    left = math.sqrt(scaling.covariance[group][group]) / GPU_EXPECTED[group]
    return round(scaled.unsure * scaling.multipliers[group] * min(1.0, left))


def _narrower(own: tuple[float, float], found: tuple[float, float]) -> tuple[float, float]:
    return max(own[0], found[0]), min(own[1], found[1])


def _wider(own: tuple[float, float], found: tuple[float, float], uncalibrated: Instant) -> tuple[float, float]:
    return min(own[0], found[0], uncalibrated.low), max(own[1], found[1], uncalibrated.high)


def calibrated_host(calibration: Calibration | None, setup: Setup, instant: HostInstant) -> HostInstant:
    if calibration is None or calibration.host_memory is None or not calibration.is_of(setup):
        return instant
    return scaled_host(instant, calibration.host_memory.multipliers)


def host_spread(calibration: Calibration | None, setup: Setup, calibrated: HostInstant) -> float:
    """How far a host demand may be off, as a part of it, for an instant that is calibrated already."""
    if calibration is None or calibration.host_memory is None or not calibration.is_of(setup):
        return HOST_SPREAD
    scaling = calibration.host_memory
    spread = math.expm1(SIDE * scaling.deviation(host_groups(calibrated)))
    return (min if calibration.narrows(scaling, HOST_NOISE, setup) else max)(spread, HOST_SPREAD)


def calibrated_time(calibration: Calibration | None, setup: Setup, step: StepTime) -> StepTime:
    if calibration is None or calibration.step_time is None or not calibration.is_of(setup):
        return step
    scaling = calibration.step_time
    scaled = replace(step, terms=scaled_terms(step, scaling.multipliers))
    spread = math.expm1(SIDE * scaling.deviation(time_groups(scaled)))
    narrows = calibration.narrows(scaling, TIME_NOISE, setup)
    return replace(scaled, spread=(min if narrows else max)(spread, step.spread))
