"""Calibrating the planner's terms on measured runs."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from measured import EXACT, MODELS, SETUP, SUBJECT, measured_run, sweep

from cpm_cluster.planner.calibrate import CalibrationError, MeasuredRun, calibrate
from cpm_cluster.planner.calibration import (
    Calibration,
    calibrated_gpu,
    calibrated_host,
    calibrated_time,
    host_spread,
)
from cpm_cluster.planner.gpu_memory import gpu_memory, gpu_need
from cpm_cluster.planner.host_memory import SPREAD, host_memory
from cpm_cluster.planner.memory_constants import MIB
from cpm_cluster.planner.setup import Setup
from cpm_cluster.planner.step_time import step_time
from cpm_cluster.planner.term_groups import GPU_GROUPS, gpu_groups, time_groups

factors = st.floats(0.6, 1.6)
setups = st.sampled_from(sweep())


def calibration_on(*runs: MeasuredRun) -> Calibration:
    found, refused = calibrate(runs, MODELS, "2026-01-31", "1.0")
    assert refused == ()
    return found


def runs_with(gpu: tuple[float, ...] = EXACT, time: tuple[float, ...] = (1.0, 1.0, 1.0)) -> list[MeasuredRun]:
    return [measured_run(setup, f"run-{i}", gpu, time) for i, setup in enumerate(sweep())]


class TestGroups:
    @given(setups)
    def test_nothing_is_lost(self, setup: Setup) -> None:
        for grouped in gpu_groups(setup, gpu_memory):
            assert sum(grouped.sums) == grouped.instant.bytes
            assert all(size >= 0 for size in grouped.sums)

    def test_what_ranks_share_is_sharded_and_what_grows_with_the_batch_are_activations(self) -> None:
        by_name = {
            component.name: dict(zip(GPU_GROUPS, share, strict=True))
            for grouped in gpu_groups(SETUP, gpu_memory)
            for component, share in zip(grouped.instant.components, grouped.shares, strict=True)
            if component.bytes
        }
        assert by_name["master copy and moments"]["whole"] == pytest.approx(0, abs=8)
        assert by_name["the head, gathered, and its gradient"]["sharded"] == 0
        assert by_name["logits"]["whole"] == pytest.approx(0, abs=8)
        assert by_name["logits"]["activations"] > 1e9
        assert by_name["CUDA context"]["constant"] > 0

    def test_a_step_is_its_groups(self) -> None:
        step = step_time(replace(SETUP, offload_optimizer=True))
        compute, transfer, cpu_optimizer = time_groups(step)
        assert compute + transfer + cpu_optimizer == pytest.approx(step.seconds)
        assert min(compute, transfer, cpu_optimizer) > 0


class TestManyRuns:
    @pytest.mark.parametrize("gpu", [(1.0, 1.0, 1.3, 1.2), (1.06, 0.95, 0.8, 1.4), (0.97, 1.05, 1.1, 0.7)])
    def test_memory_of_unseen_setups_is_found_within_three_percent(self, gpu: tuple[float, ...]) -> None:
        seen, unseen = runs_with(gpu)[::2], runs_with(gpu)[1::2]
        found = calibration_on(*seen)
        for run in unseen:
            predicted = calibrated_gpu(found, run.setup, gpu_memory).binding.bytes / MIB
            assert predicted == pytest.approx(run.gpu_memory_mib, rel=0.03)

    def test_memory_multipliers_are_recovered(self) -> None:
        truth = (1.05, 0.95, 1.3, 1.3)
        scaling = calibration_on(*runs_with(truth)).gpu_memory
        assert scaling is not None
        assert scaling.multipliers == pytest.approx(truth, rel=0.05)
        assert scaling.residual < 0.01

    def test_speed_multipliers_are_recovered(self) -> None:
        truth = (1.2, 1.5, 0.4)
        scaling = calibration_on(*runs_with(time=truth)).step_time
        assert scaling is not None
        assert scaling.multipliers == pytest.approx(truth, rel=0.05)

    def test_one_odd_run_does_not_bend_the_others(self) -> None:
        good = runs_with((1.0, 1.0, 1.3, 1.2))
        odd = replace(good[3], name="odd", gpu_memory_mib=1.6 * (good[3].gpu_memory_mib or 0))
        clean, bent = (calibration_on(*runs).gpu_memory for runs in (good, [*good, odd]))
        assert clean is not None
        assert bent is not None
        assert bent.multipliers == pytest.approx(clean.multipliers, rel=0.05)

    def test_runs_that_agree_narrow_the_intervals(self) -> None:
        found = calibration_on(*runs_with())
        uncalibrated, calibrated = gpu_need(SETUP), calibrated_gpu(found, SETUP, gpu_need)
        assert uncalibrated.low <= calibrated.low < calibrated.high <= uncalibrated.high
        assert calibrated.high - calibrated.low < uncalibrated.high - uncalibrated.low
        step = step_time(SETUP)
        assert calibrated_time(found, SETUP, step).spread < step.spread

    def test_a_mode_of_which_no_run_told_keeps_the_wider_interval(self) -> None:
        found = calibration_on(*runs_with((1.0, 1.0, 0.7, 0.8)))
        lora = replace(SETUP, mode="lora", lora_rank=8, lora_targets=("q", "v"))
        assert calibrated_gpu(found, lora, gpu_need).high >= gpu_need(lora).high
        assert calibrated_time(found, lora, step_time(lora)).spread >= step_time(lora).spread


class TestOneRun:
    @given(setups, factors, factors, factors, factors)
    def test_never_makes_the_prediction_of_that_run_worse(
        self, setup: Setup, a: float, b: float, c: float, d: float
    ) -> None:
        run = measured_run(setup, gpu=(a, b, c, d), time=(a, b, c))
        found = calibration_on(run)
        before = gpu_memory(setup).binding.bytes / MIB
        after = calibrated_gpu(found, setup, gpu_memory).binding.bytes / MIB
        assert run.gpu_memory_mib is not None
        assert abs(math.log(after / run.gpu_memory_mib)) <= abs(math.log(before / run.gpu_memory_mib)) + 1e-6
        step = step_time(setup)
        calibrated = calibrated_time(found, setup, step).tokens_per_second_per_gpu
        assert run.tokens_per_s_per_gpu is not None
        assert abs(math.log(calibrated / run.tokens_per_s_per_gpu)) <= 1e-6 + abs(
            math.log(step.tokens_per_second_per_gpu / run.tokens_per_s_per_gpu)
        )

    def test_moves_activations_and_the_constant_and_hardly_what_is_counted(self) -> None:
        setup = replace(SETUP, micro_batch=16)
        scaling = calibration_on(measured_run(setup, gpu=(1.0, 1.0, 1.3, 1.0))).gpu_memory
        assert scaling is not None
        whole, sharded, activations, _ = scaling.multipliers
        assert abs(activations - 1) > 5 * max(abs(whole - 1), abs(sharded - 1))

    def test_that_is_as_predicted_changes_nothing(self) -> None:
        scaling = calibration_on(measured_run(SETUP)).gpu_memory
        assert scaling is not None
        assert scaling.multipliers == pytest.approx(EXACT, abs=1e-6)

    def test_that_is_far_off_widens_the_interval(self) -> None:
        found = calibration_on(measured_run(SETUP, gpu=(1.8, 1.8, 1.8, 1.8)))
        assert calibrated_gpu(found, SETUP, gpu_need).high > gpu_need(SETUP).high

    def test_of_a_full_card_is_a_bound(self) -> None:
        more = replace(measured_run(SETUP, gpu=(1.3, 1.3, 1.3, 1.3)), gpu_total_mib=None)
        full = replace(more, gpu_total_mib=(more.gpu_memory_mib or 0) / 0.95)
        scaling = calibration_on(full).gpu_memory
        assert scaling is not None
        assert scaling.multipliers == pytest.approx(EXACT)

    def test_tells_of_the_host(self) -> None:
        planned = host_memory(SETUP).observed
        found = calibration_on(replace(measured_run(SETUP), host_memory_bytes=1.2 * planned.bytes))
        assert planned.bytes < calibrated_host(found, SETUP, planned).bytes < 1.2 * planned.bytes
        assert host_spread(None, SETUP, planned) == SPREAD
        assert host_spread(found, SETUP, planned) <= SPREAD

    def test_what_was_scaled_shows_it(self) -> None:
        found = calibration_on(measured_run(replace(SETUP, micro_batch=16), gpu=(1.0, 1.0, 1.3, 1.0)))
        shown = [c.formula for c in calibrated_gpu(found, SETUP, gpu_need).binding.components]
        assert any("calibrated" in formula for formula in shown)


def test_without_a_calibration_predictions_are_as_they_are() -> None:
    assert calibrated_gpu(None, SETUP, gpu_need) == gpu_need(SETUP)
    step = step_time(SETUP)
    assert calibrated_time(None, SETUP, step) is step


def test_another_engine_is_planned_as_ever() -> None:
    found, other = calibration_on(*runs_with((1.0, 1.0, 0.7, 0.8))), replace(SETUP, engine="fsdp")
    assert calibrated_gpu(found, other, gpu_need) == gpu_need(other)
    assert calibrated_time(found, other, step_time(other)) == step_time(other)
    planned = host_memory(other).binding
    assert calibrated_host(found, other, planned) == planned


def test_the_note_says_from_what() -> None:
    note = calibration_on(*runs_with()[:2]).note
    assert note.startswith("calibrated on 2 runs (full) of bmtrain on a100-80g, image cpmlive-flash:0.0.4, 2026-01-31:")
    assert "GPU memory within 0%" in note


GARBAGE = {
    "nothing was measured": {"gpu_memory_mib": None, "tokens_per_s_per_gpu": None},
    "its GPU memory is 0": {"gpu_memory_mib": 0.0},
    "its speed is nan": {"tokens_per_s_per_gpu": math.nan},
    "MiB are planned: another program": {"gpu_memory_mib": 300.0},
    "on a card of": {"gpu_memory_mib": 30_000.0, "gpu_total_mib": 24_000.0},
    "host memory is 1.0 GB a node": {"host_memory_bytes": 1e9},
    "would be an MFU of": {"tokens_per_s_per_gpu": 1e6},
    "times slower than planned": {"tokens_per_s_per_gpu": 1.0},
    "calibrate each by itself": {"subject": replace(SUBJECT, gpu="h100-80g")},
}


@pytest.mark.parametrize("why", GARBAGE)
def test_a_run_that_cannot_be_right_is_left_out_by_name(why: str) -> None:
    bad = replace(measured_run(SETUP, "bad"), **GARBAGE[why])  # type: ignore[arg-type]
    found, refused = calibrate([measured_run(SETUP, "good"), bad], MODELS, "2026-01-31", "1.0")
    assert found.runs == ("good",)
    assert [refusal.name for refusal in refused] == ["bad"]
    assert why in str(refused[0])


def test_without_a_good_run_there_is_no_calibration() -> None:
    bad = replace(measured_run(SETUP, "bad"), gpu_memory_mib=300.0)
    with pytest.raises(CalibrationError, match="bad: its GPU memory is 300 MiB"):
        calibrate([bad], MODELS, "2026-01-31", "1.0")


def test_a_run_that_is_named_twice_counts_once() -> None:
    run = measured_run(SETUP, gpu=(1.0, 1.0, 1.2, 1.0))
    once, twice = calibration_on(run), calibration_on(run, run)
    assert once == twice
