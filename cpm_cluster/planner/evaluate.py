"""How well the planner predicts a table of measured runs."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cpm_cluster.planner.gpu_memory import STAGING, GpuMemory, gpu_memory, gpu_need, reading
from cpm_cluster.planner.host_memory import host_memory
from cpm_cluster.planner.memory_constants import MIB
from cpm_cluster.planner.rows import Row
from cpm_cluster.planner.setup import Setup

GB = 10**9
WORST = 10


@dataclass(frozen=True)
class Prediction:
    """Of one row; `low` and `high` are the interval of `gpu_mem_mb` (MiB)."""

    id: str
    gpu_mem_mb: float
    host_mem_gb: float
    fits: bool
    tokens_per_s_per_gpu: float | None
    low: float
    high: float


@dataclass(frozen=True)
class Score:
    """Of the predictions of one quantity."""

    rows: int
    mape: float | None
    within_10: float | None
    within_20: float | None


@dataclass(frozen=True)
class FitScore:
    """Of fit or no fit; `false_fits` are the ids of runs that died and were said to fit."""

    rows: int
    died: int
    caught: int
    fitted: int
    said_to_fit: int
    balanced_accuracy: float | None
    false_fits: tuple[str, ...]


@dataclass(frozen=True)
class Evaluation:
    predictions: tuple[Prediction, ...]
    gpu: Score
    host: Score
    time: Score
    fit: FitScore
    gpu_by_group: dict[str, Score]
    in_interval: float | None
    worst: tuple[tuple[str, float], ...]

    def as_json(self) -> dict[str, Any]:
        summary = {name: value for name, value in asdict(self).items() if name != "predictions"}
        return {"summary": summary, "rows": [asdict(prediction) for prediction in self.predictions]}


def evaluate(rows: Sequence[Row]) -> Evaluation:
    speed = _speed_model()
    predictions = tuple(predict(row, speed) for row in rows)
    pairs = list(zip(rows, predictions, strict=True))
    gpu = [(row, gpu_error(row, prediction)) for row, prediction in pairs]
    scored = [(row, error) for row, error in gpu if error is not None]
    groups: dict[str, list[float]] = {}
    for row, error in scored:
        groups.setdefault(f"{row.setup.engine} {row.setup.mode}", []).append(error)
    read = [(r.reading.gpu_memory_mib, p) for r, p in pairs if r.use_gpu and r.reading.gpu_memory_mib]
    inside = [p.low <= measured <= p.high for measured, p in read if measured]
    worst = sorted(((row.id, error) for row, error in scored), key=lambda pair: -abs(pair[1]))[:WORST]
    return Evaluation(
        predictions=predictions,
        gpu=score(error for _, error in scored),
        host=score(_present(host_error(row, prediction) for row, prediction in pairs)),
        time=score(_present(time_error(row, prediction) for row, prediction in pairs)),
        fit=fit_score(pairs),
        gpu_by_group={name: score(errors) for name, errors in sorted(groups.items())},
        in_interval=sum(inside) / len(inside) if inside else None,
        worst=tuple(worst),
    )


def predict(row: Row, speed: Callable[[Setup], float] | None = None) -> Prediction:
    setup = row.setup
    memory = gpu_memory(setup)
    low, high = _interval(memory, setup)
    host = host_memory(setup)
    return Prediction(
        id=row.id,
        gpu_mem_mb=_digits(reading(memory, setup).bytes / MIB),
        host_mem_gb=_digits(host.observed.bytes / GB),
        fits=_fits(setup, gpu_need(setup), host.high / GB),
        tokens_per_s_per_gpu=_digits(speed(setup)) if speed else None,
        low=_digits(low / MIB),
        high=_digits(high / MIB),
    )


def _interval(memory: GpuMemory, setup: Setup) -> tuple[int, int]:
    """Bytes between which the reading lies: any instant that it can show may turn out the fullest."""
    starts = setup.metric in ("allocated", "reserved")
    shown = [instant for instant in memory.instants if starts or instant.name != STAGING]
    return max(instant.low for instant in shown), max(instant.high for instant in shown)


def _digits(number: float) -> float:
    """Six of them: small ones are not rounded to nothing."""
    return float(f"{number:.6g}")


def _fits(setup: Setup, need: GpuMemory, host_gb: float) -> bool:
    """Only what surely fits; a card or a host of unknown size is not held against it."""
    on_gpu = need.verdict(setup.gpu_memory_mib) in ("fits", "capacity unknown")
    return on_gpu and not (setup.host_memory_gb and host_gb > setup.host_memory_gb)


def _speed_model() -> Callable[[Setup], float] | None:
    """The planner's model of step times, where it is there."""
    try:
        module = importlib.import_module("cpm_cluster.planner.step_time")
    except ModuleNotFoundError:
        return None
    function: Callable[[Setup], float] = module.tokens_per_second_per_gpu
    return function


def gpu_error(row: Row, prediction: Prediction) -> float | None:
    """Relative; of a censored reading only what lies above it."""
    measured = row.reading.gpu_memory_mib
    if not row.use_gpu or not measured:
        return None
    error = prediction.gpu_mem_mb / measured - 1
    bound_only = row.reading.gpu_censored and row.setup.metric != "allocated"
    return max(0.0, error) if bound_only else error


def host_error(row: Row, prediction: Prediction) -> float | None:
    """Relative; of a host that ran out the reading is a limit that the need exceeds."""
    measured = row.reading.host_memory_gb
    if not row.use_host or not measured:
        return None
    error = prediction.host_mem_gb / measured - 1
    return min(0.0, error) if row.reading.outcome == "oom_host" else error


def time_error(row: Row, prediction: Prediction) -> float | None:
    measured, predicted = row.reading.tokens_per_s_per_gpu, prediction.tokens_per_s_per_gpu
    if not row.use_time or not measured or predicted is None:
        return None
    return predicted / measured - 1


def fit_score(pairs: Iterable[tuple[Row, Prediction]]) -> FitScore:
    used = [(row, prediction) for row, prediction in pairs if row.use_fit and row.reading.outcome]
    died = [(row, p) for row, p in used if row.reading.outcome.startswith("oom")]
    lived = [(row, p) for row, p in used if row.reading.outcome == "ok"]
    caught = sum(not p.fits for _, p in died)
    said = sum(p.fits for _, p in lived)
    balanced = (caught / len(died) + said / len(lived)) / 2 if died and lived else None
    false_fits = tuple(row.id for row, p in died if p.fits)
    return FitScore(len(used), len(died), caught, len(lived), said, balanced, false_fits)


def score(errors: Iterable[float]) -> Score:
    sizes = [abs(error) for error in errors]
    if not sizes:
        return Score(0, None, None, None)
    count = len(sizes)
    within = [sum(size <= bound for size in sizes) / count for bound in (0.10, 0.20)]
    return Score(count, sum(sizes) / count, *within)


def _present(errors: Iterable[float | None]) -> Iterable[float]:
    return (error for error in errors if error is not None)
