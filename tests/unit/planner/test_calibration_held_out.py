"""Calibrated on a half of each large source of measured_runs.csv, the other half is predicted no worse.

The planner's constants were fitted on these rows, so that little is left to gain there. What calibration is for is
software of which the planner knows nothing: the same rows with the version of the software left out, and with a
pipeline that wastes no more than other programs do.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cpm_cluster.planner.calibrate import MeasuredRun, Models, calibrate
from cpm_cluster.planner.calibration import Calibration, Subject, calibrated_gpu, calibrated_time
from cpm_cluster.planner.gpu_memory import gpu_memory, gpu_need, reading
from cpm_cluster.planner.memory_constants import CONSTANTS, MIB
from cpm_cluster.planner.rows import Row, read_rows
from cpm_cluster.planner.setup import Setup
from cpm_cluster.planner.step_time import step_time
from cpm_cluster.planner.term_groups import GpuModel

TABLE = Path(__file__).parents[2] / "data" / "measured_runs.csv"
SOURCES: dict[str, Callable[[Row], bool]] = {
    "BigScience, fp16": lambda row: "tr11-176B" in row.source and row.setup.precision == "fp16",
    "ms-swift": lambda row: "modelscope/swift" in row.source,
    "Qwen, one GPU": lambda row: "QwenLM" in row.source and row.setup.engine == "none",
    "Qwen, DeepSpeed": lambda row: "QwenLM" in row.source and row.setup.engine == "deepspeed",
}
HALVES = 6
UNFITTED = replace(CONSTANTS, pipeline_fragmentation=CONSTANTS.fragmentation)


def unknown_software(setup: Setup) -> Setup:
    return replace(setup, engine_version="")


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return read_rows(TABLE)


def run_of(row: Row, change: Callable[[Setup], Setup], source: str) -> MeasuredRun:
    gpu, speed = row.reading.gpu_memory_mib, row.reading.tokens_per_s_per_gpu
    return MeasuredRun(
        name=row.id,
        subject=Subject(source, row.setup.gpu, row.setup.engine),
        setup=change(row.setup),
        gpu_memory_mib=gpu if row.use_gpu else None,
        gpu_total_mib=None if row.setup.metric == "allocated" else row.setup.gpu_memory_mib,
        host_memory_bytes=None,
        tokens_per_s_per_gpu=speed if row.use_time else None,
    )


def halves(runs: list[MeasuredRun]) -> Iterator[tuple[list[MeasuredRun], list[MeasuredRun]]]:
    order, chance = list(runs), random.Random(4)
    for _ in range(HALVES):
        chance.shuffle(order)
        yield order[::2], order[1::2]


def memory_error(run: MeasuredRun, calibration: Calibration | None, model: GpuModel) -> float | None:
    if run.gpu_memory_mib is None:
        return None
    return abs(reading(calibrated_gpu(calibration, run.setup, model), run.setup).bytes / MIB / run.gpu_memory_mib - 1)


def speed_error(run: MeasuredRun, calibration: Calibration | None, model: GpuModel) -> float | None:
    if run.tokens_per_s_per_gpu is None:
        return None
    step = calibrated_time(calibration, run.setup, step_time(run.setup))
    return abs(step.tokens_per_second_per_gpu / run.tokens_per_s_per_gpu - 1)


def mean_errors(
    runs: list[MeasuredRun], model: GpuModel, error: Callable[[MeasuredRun, Calibration | None, GpuModel], float | None]
) -> tuple[float, float]:
    """(uncalibrated, calibrated) mean absolute errors of the halves that were not calibrated on."""
    sums, count = [0.0, 0.0], 0
    for seen, unseen in halves(runs):
        found, _ = calibrate(seen, Models(gpu_memory=model), "2026-01-31", "1.0")
        for run in unseen:
            before, after = error(run, None, model), error(run, found, model)
            if before is not None and after is not None:
                sums[0] += before
                sums[1] += after
                count += 1
    return sums[0] / count, sums[1] / count


def show(title: str, errors: dict[str, tuple[float, float]]) -> None:
    for name, (before, after) in errors.items():
        print(f"{title:<36} {name:<18} {before:6.1%} uncalibrated {after:6.1%} calibrated")


def test_memory_of_known_software_is_predicted_no_worse(rows: list[Row]) -> None:
    errors = {
        name: mean_errors([run_of(r, lambda s: s, name) for r in rows if r.use_gpu and of(r)], gpu_memory, memory_error)
        for name, of in SOURCES.items()
    }
    show("memory, known software", errors)
    assert sum(after for _, after in errors.values()) < sum(before for before, _ in errors.values())
    # readings of BigScience are whole GB: nothing is left to gain below 3 %
    assert all(after <= before + 0.003 for before, after in errors.values())


def test_memory_of_unknown_software_is_predicted_better(rows: list[Row]) -> None:
    def model(setup: Setup) -> object:
        return gpu_memory(setup, UNFITTED)

    errors = {
        name: mean_errors([run_of(r, unknown_software, name) for r in rows if r.use_gpu and of(r)], model, memory_error)  # type: ignore[arg-type]
        for name, of in SOURCES.items()
    }
    show("memory, unknown software", errors)
    assert all(after < before for before, after in errors.values())
    assert errors["BigScience, fp16"][1] < 0.75 * errors["BigScience, fp16"][0]
    assert errors["ms-swift"][1] < 0.65 * errors["ms-swift"][0]


def test_speed_is_predicted_no_worse(rows: list[Row]) -> None:
    sources = {name: of for name, of in SOURCES.items() if name != "ms-swift"}
    sources["llm-foundry, H100"] = lambda row: "llm-foundry" in row.source and row.setup.gpu == "h100-80g"
    sources["llm-foundry, A100"] = lambda row: "llm-foundry" in row.source and row.setup.gpu == "a100-80g"
    errors = {
        name: mean_errors(
            [run_of(r, lambda s: s, name) for r in rows if r.use_time and r.reading.tokens_per_s_per_gpu and of(r)],
            gpu_memory,
            speed_error,
        )
        for name, of in sources.items()
    }
    show("speed", errors)
    assert sum(after for _, after in errors.values()) < sum(before for before, _ in errors.values())
    # three numbers don't serve full training and 4-bit adapters alike, of which the rows of Qwen with DeepSpeed are
    assert all(after <= before + 0.007 for before, after in errors.values())


def test_no_run_that_died_fits_once_its_source_is_calibrated(rows: list[Row]) -> None:
    died = [row for row in rows if row.use_fit and row.reading.outcome == "oom_gpu"]
    judged = 0
    for row in died:
        like = [r for r in rows if r.use_gpu and r.source == row.source and r.setup.engine == row.setup.engine]
        if not like:
            continue
        runs = [run_of(r, lambda s: s, row.source) for r in like if r.setup.gpu == row.setup.gpu]
        if not runs:
            continue
        found, _ = calibrate(runs, Models(gpu_memory=gpu_memory), "2026-01-31", "1.0")
        need = calibrated_gpu(found, replace(row.setup, metric="nvml"), gpu_need)
        assert need.verdict(row.setup.gpu_memory_mib) != "fits", row.id
        judged += 1
    assert judged >= 8


def test_intervals_of_calibrated_halves_hold_most_readings(rows: list[Row]) -> None:
    inside = []
    for name, of in SOURCES.items():
        for seen, unseen in halves([run_of(r, lambda s: s, name) for r in rows if r.use_gpu and of(r)]):
            found, _ = calibrate(seen, Models(gpu_memory=gpu_memory), "2026-01-31", "1.0")
            for run in unseen:
                memory = calibrated_gpu(found, run.setup, gpu_memory)
                inside.append(memory.low <= (run.gpu_memory_mib or math.inf) * MIB <= memory.high)
    print(f"{sum(inside) / len(inside):.0%} of {len(inside)} readings lie within")
    assert sum(inside) / len(inside) >= 0.8
