"""From measured runs to a calibration; runs that can't be right are refused by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from cpm_cluster.planner import calibration as of
from cpm_cluster.planner.calibration import Calibration, Scaling, Subject
from cpm_cluster.planner.host_memory import HostMemory, host_memory
from cpm_cluster.planner.least_squares import Observation, Solution, Vector, residual, solve
from cpm_cluster.planner.memory_constants import MIB
from cpm_cluster.planner.setup import Setup
from cpm_cluster.planner.step_time import StepTime, step_time
from cpm_cluster.planner.term_groups import GpuModel, gpu_groups, host_groups, lasts, time_groups

# Above this part of the card the allocator's cache fills it whatever the need: the reading is a bound.
FULL = 0.9
# A reading so many times the prediction, or such a part of it, is of something else: another job, another card.
FAR_MEMORY = 2.5
FAR_TIME = 10.0

HostModel = Callable[[Setup], HostMemory]
TimeModel = Callable[[Setup], StepTime]


class CalibrationError(ValueError):
    """No run is left to calibrate on; the message names each, and why."""


@dataclass(frozen=True)
class MeasuredRun:
    """What one run did. None: not measured."""

    name: str
    subject: Subject
    setup: Setup
    gpu_memory_mib: float | None  # peak of the fullest GPU, as nvidia-smi says
    gpu_total_mib: float | None
    host_memory_bytes: float | None  # peak of the fullest node
    tokens_per_s_per_gpu: float | None


@dataclass(frozen=True)
class Refusal:
    name: str
    why: str

    def __str__(self) -> str:
        return f"{self.name}: {self.why}"


@dataclass(frozen=True)
class Models:
    """The models as the answer uses them, and what is expected of their multipliers and beside them.

    `gpu_memory` includes what the allocator's cache has reserved.
    """

    gpu_memory: GpuModel
    host_memory: HostModel = host_memory
    step_time: TimeModel = step_time
    time_expected: Vector = of.TIME_EXPECTED
    host_noise: float = of.HOST_NOISE
    time_noise: float = of.TIME_NOISE


def calibrate(
    runs: Sequence[MeasuredRun], models: Models, date: str, version: str
) -> tuple[Calibration, tuple[Refusal, ...]]:
    """The calibration of runs of one subject, and the runs that were left out.

    Raises:
        CalibrationError: none is left.
    """
    refused = tuple(_refusals(runs, models))
    names = {refusal.name for refusal in refused}
    good = [run for run in _once(runs) if run.name not in names]
    if not good:
        raise CalibrationError("\n".join(map(str, refused)) or "no runs are named")
    return (
        Calibration(
            subject=good[0].subject,
            modes=tuple(sorted({run.setup.mode for run in good})),
            runs=tuple(run.name for run in good),
            date=date,
            version=version,
            gpu_memory=_scaling(_gpu_observations(good, models), of.GPU_EXPECTED, of.GPU_NOISE),
            host_memory=_scaling(_host_observations(good, models), of.HOST_EXPECTED, models.host_noise),
            step_time=_scaling(_time_observations(good, models), models.time_expected, models.time_noise),
        ),
        refused,
    )


def _once(runs: Iterable[MeasuredRun]) -> Iterable[MeasuredRun]:
    """A run that is named twice counts once."""
    return {run.name: run for run in runs}.values()


def _scaling(observations: list[Observation], expected: Vector, noise: float) -> Scaling | None:
    if not observations:
        return None
    found: Solution = solve(observations, expected, noise)
    squares = [residual(each, found.logs) ** 2 for each in observations]
    off = math.sqrt(sum(squares) / len(squares))
    return Scaling(found.multipliers, found.covariance, found.noise, off, len(observations))


def _gpu_observations(runs: list[MeasuredRun], models: Models) -> list[Observation]:
    return [
        Observation(_gpu_alternatives(run, models), run.gpu_memory_mib * MIB, _is_full(run))
        for run in runs
        if run.gpu_memory_mib is not None
    ]


def _gpu_alternatives(run: MeasuredRun, models: Models) -> tuple[Vector, ...]:
    """What is there for seconds at the start alone, samples may miss."""
    return tuple(g.sums for g in gpu_groups(run.setup, models.gpu_memory) if lasts(g.instant))


def _is_full(run: MeasuredRun) -> bool:
    total = run.gpu_total_mib or run.setup.gpu_memory_mib
    return bool(total) and (run.gpu_memory_mib or 0) > FULL * total


def _host_observations(runs: list[MeasuredRun], models: Models) -> list[Observation]:
    """Beside training alone, for samples may miss a save: where one was seen, the calibration errs upwards."""
    return [
        Observation((host_groups(models.host_memory(run.setup).observed),), run.host_memory_bytes)
        for run in runs
        if run.host_memory_bytes is not None
    ]


def _time_observations(runs: list[MeasuredRun], models: Models) -> list[Observation]:
    found = []
    for run in runs:
        if run.tokens_per_s_per_gpu is not None:
            step = models.step_time(run.setup)
            found.append(Observation((time_groups(step),), step.tokens / step.gpus / run.tokens_per_s_per_gpu))
    return found


def _refusals(runs: Sequence[MeasuredRun], models: Models) -> Iterator[Refusal]:
    first = runs[0].subject if runs else None
    for run in _once(runs):
        if run.subject != first:
            yield Refusal(run.name, f"is of {run.subject}, the others are of {first}; calibrate each by itself")
        else:
            why = next(_objections(run, models), None)
            if why:
                yield Refusal(run.name, why)


def _objections(run: MeasuredRun, models: Models) -> Iterator[str]:
    readings = (run.gpu_memory_mib, run.host_memory_bytes, run.tokens_per_s_per_gpu)
    if all(value is None for value in readings):
        yield "nothing was measured: neither memory nor speed"
        return
    for what, value in zip(("GPU memory", "host memory", "speed"), readings, strict=True):
        if value is not None and not (math.isfinite(value) and value > 0):
            yield f"its {what} is {value:g}, which is no measurement"
            return
    yield from _memory_objections(run, models)
    yield from _time_objections(run, models)


def _memory_objections(run: MeasuredRun, models: Models) -> Iterator[str]:
    if run.gpu_memory_mib is not None:
        if run.gpu_total_mib and run.gpu_memory_mib > run.gpu_total_mib:
            yield f"its GPU memory is {run.gpu_memory_mib:,.0f} MiB on a card of {run.gpu_total_mib:,.0f} MiB"
        planned = max(sum(sums) for sums in _gpu_alternatives(run, models)) / MIB
        if not 1 / FAR_MEMORY <= run.gpu_memory_mib / planned <= FAR_MEMORY and not _is_full(run):
            yield (
                f"its GPU memory is {run.gpu_memory_mib:,.0f} MiB where {planned:,.0f} MiB are planned:"
                " another program on the cards, or another job than was planned"
            )
    if run.host_memory_bytes is not None:
        planned = models.host_memory(run.setup).observed.bytes
        if not 1 / FAR_MEMORY <= run.host_memory_bytes / planned <= FAR_MEMORY:
            yield (
                f"its host memory is {run.host_memory_bytes / 1e9:,.1f} GB a node where {planned / 1e9:,.1f} GB are"
                " planned: not all ranks were seen, or another job than was planned"
            )


def _time_objections(run: MeasuredRun, models: Models) -> Iterator[str]:
    if run.tokens_per_s_per_gpu is None:
        return
    step = models.step_time(run.setup)
    ratio = run.tokens_per_s_per_gpu / step.tokens_per_second_per_gpu
    flops = step.model_flops_per_token - step.masked_flops_per_token
    mfu = run.tokens_per_s_per_gpu * flops / step.peak_flops if step.peak_flops else 0.0
    if mfu > step.mfu_limit:
        yield f"its speed would be an MFU of {mfu:.0%}: tokens are counted twice, or it ran on another GPU"
    elif ratio < 1 / FAR_TIME:
        yield f"it is {1 / ratio:,.0f} times slower than planned: it waited for something else than its processors"
