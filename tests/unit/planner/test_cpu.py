"""Jobs without GPUs: host memory and time as runs on the same machine were measured."""

from __future__ import annotations

from dataclasses import replace

import pytest
from planned_jobs import packaged

from cpm_cluster.planner import cpu
from cpm_cluster.planner.answer import NO_RATE_YET, answer
from cpm_cluster.planner.calibrate import MeasuredRun, Models, calibrate
from cpm_cluster.planner.calibration import Calibration, Subject
from cpm_cluster.planner.fit import Demand
from cpm_cluster.planner.gpu_memory import gpu_memory
from cpm_cluster.planner.inference import NO_TIME
from cpm_cluster.planner.job_setup import CPU, job_setup
from cpm_cluster.planner.setup import Setup
from cpm_cluster.specs.job import JobSpec

MODELS = Models(gpu_memory, cpu.host_memory, cpu.step_time, cpu.TIME_EXPECTED, cpu.NOISE, cpu.NOISE)
JOB = packaged("quickstart")
SIZES = ("training.micro_batch=2", "training.micro_batch=4", "model.layers=2")


def setup_of(spec: JobSpec) -> Setup:
    setup = job_setup(spec)
    assert setup is not None
    return setup


def calibration(memory: float, slowness: tuple[float, ...], engine: str = "ddp") -> Calibration:
    runs = []
    for number, (change, slow) in enumerate(zip(SIZES, slowness, strict=True)):
        setup = setup_of(packaged("quickstart", change))
        step, host = cpu.step_time(setup), cpu.host_memory(setup).binding.bytes
        speed = step.tokens / step.gpus / step.seconds / slow
        runs.append(MeasuredRun(f"run-{number}", Subject("", CPU, engine), setup, None, None, memory * host, speed))
    found, refused = calibrate(runs, MODELS, "2026-01-31", "1.0")
    assert refused == ()
    return found


def host(spec: JobSpec, of: Calibration | None = None) -> Demand:
    (found,) = [demand for demand in answer(spec, of).demands if demand.resource == "host memory"]
    return found


def test_uncalibrated_no_time_is_claimed_and_how_to_get_one_is_said() -> None:
    fit = answer(JOB)
    assert (fit.time, fit.notes) == (None, (NO_RATE_YET,))
    assert "cpm calibrate" in NO_RATE_YET


def test_a_step_takes_as_long_as_its_operations_at_one_rate() -> None:
    one, twice = (cpu.step_time(setup_of(packaged("quickstart", f"training.micro_batch={n}"))) for n in (1, 2))
    assert twice.seconds == pytest.approx(2 * one.seconds)
    assert twice.tokens == 2 * one.tokens == 2 * 2 * 256
    assert twice.mfu is None and twice.credible


@pytest.mark.parametrize("slow", [0.3, 1.0, 5.0])
def test_time_is_that_of_the_runs(slow: float) -> None:
    time = answer(JOB, calibration(1.0, (slow,) * 3)).time
    assert time is not None
    assert time.step.seconds == pytest.approx(slow * cpu.step_time(setup_of(JOB)).seconds, rel=0.05)


def test_runs_that_disagree_make_the_interval_wider() -> None:
    steady, shaky = (answer(JOB, calibration(1.0, of)).time for of in ((2.0, 2.0, 2.0), (1.0, 2.0, 4.0)))
    assert steady and shaky
    assert shaky.high_s / shaky.low_s > 1.3 * steady.high_s / steady.low_s
    assert steady.high_s / steady.low_s > 1.3  # they share their cores with others in any case


def test_host_memory_follows_the_runs() -> None:
    scaled = host(JOB, calibration(1.3, (1.0,) * 3))
    assert scaled.bytes == pytest.approx(1.3 * host(JOB).bytes, rel=0.05)
    assert scaled.low_bytes < scaled.bytes < scaled.high_bytes


def test_a_calibration_of_another_engine_says_nothing() -> None:
    other = replace(calibration(2.0, (2.0,) * 3), subject=Subject("", CPU, "fsdp"))
    assert answer(JOB, other) == answer(JOB)


def test_what_does_not_train_is_not_timed() -> None:
    fit = answer(replace(JOB, task="evaluate"), calibration(1.0, (1.0,) * 3))
    assert (fit.time, fit.notes) == (None, (NO_TIME,))
