"""Programs of users' own, judged as the job describes them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from planned_jobs import N, packaged, small

from cpm_cluster.planner.answer import AS_DESCRIBED, answer
from cpm_cluster.planner.fit import Demand, Fit
from cpm_cluster.planner.job_setup import job_setup
from cpm_cluster.planner.suggest import NoSuggestion, suggest
from cpm_cluster.specs.job import JobSpec

PROGRAM = """\
name: own
model: {layers: 10, hidden: 2048, heads: 16, ffn: 8192, vocab: 4096}
cluster: ./site.yaml
image: {tag: 'x:1', bmtrain: 1.0.1, deepspeed: 0.14.0}
engine: command
command: [python, x.py]
"""


def program(folder: Path, workload: str, *overrides: str) -> JobSpec:
    return small(folder, f"workload={{{workload}, precision: bf16, seq_len: 1024}}", *overrides, job=PROGRAM)


def of(fit: Fit, resource: str) -> Demand:
    (found,) = [demand for demand in fit.demands if demand.resource == resource]
    return found


class TestInference:
    def test_spreads_the_weights_over_all_gpus(self) -> None:
        eight, four = (
            of(answer(packaged("infer_100b", *change)), "GPU memory") for change in ((), ("resources.gpus_per_node=4",))
        )
        weights = [next(part.bytes for part in d.components if part.name == "weights") for d in (eight, four)]
        assert weights == [pytest.approx(2 * 100.18e9 / 8, rel=1e-3), pytest.approx(2 * 100.18e9 / 4, rel=1e-3)]

    def test_holds_keys_and_values_of_the_whole_batch(self, tmp_path: Path) -> None:
        cache = "key/value cache"
        one, eight = (
            of(answer(program(tmp_path, f"mode: infer, engine: torch, micro_batch: {n}")), "GPU memory") for n in (1, 8)
        )
        sizes = [next(part.bytes for part in d.components if part.name == cache) for d in (one, eight)]
        assert sizes[1] == 8 * sizes[0] > 0

    @pytest.mark.parametrize(
        ("job", "profile", "gpu_gb"),
        [("infer_10b", "minimal-infer-10b", 20), ("infer_100b", "minimal-infer-100b", 50)],
    )
    def test_needs_about_what_the_manual_found_to_be_the_least(self, job: str, profile: str, gpu_gb: int) -> None:
        fit = answer(packaged(job, f"profile={profile}"))
        assert of(fit, "GPU memory").bytes == pytest.approx(gpu_gb * 1e9, rel=0.1)
        assert of(fit, "GPU memory").verdict == "fits"
        assert of(fit, "host memory").verdict == "tight"  # the table's own figure leaves nothing to spare

    def test_in_four_bits_takes_a_quarter(self) -> None:
        half, quarter = (
            of(answer(packaged("infer_100b", f"workload.precision={p}")), "GPU memory") for p in ("fp16", "int4")
        )
        assert quarter.bytes < half.bytes / 2.5

    def test_has_neither_checkpoints_nor_steps(self) -> None:
        fit = answer(packaged("infer_100b"))
        assert "disk" not in {demand.resource for demand in fit.demands}
        assert fit.time is None


class TestTraining:
    def test_is_planned_as_a_job_of_ours_with_the_same_figures(self, tmp_path: Path) -> None:
        own = job_setup(
            program(tmp_path, "mode: train, engine: bmtrain, micro_batch: 2, recompute: full, offload_optimizer: true")
        )
        training = "training={seq_len: 1024, micro_batch: 2, recompute: full, offload_optimizer: true, precision: bf16}"
        assert own is not None
        # Of our trainer it is known that what is frozen is so before BMTrain lays out its blocks.
        assert replace(own, frozen_first=True) == job_setup(small(tmp_path, "engine=bmtrain", training))

    def test_of_adapters_follows_method(self, tmp_path: Path) -> None:
        setup = job_setup(program(tmp_path, "mode: train, engine: deepspeed", "method={lora: {rank: 8}}"))
        assert setup and setup.mode == "lora" and 0 < setup.trained_parameters < N / 100

    def test_takes_time_where_its_steps_are_stated(self, tmp_path: Path) -> None:
        described = "mode: train, engine: bmtrain"
        assert answer(program(tmp_path, described)).time is None
        time = answer(program(tmp_path, f"{described}, steps: 100")).time
        assert time and time.steps == 100 and time.seconds > 0

    def test_that_is_too_large_is_refused_without_advice_that_would_not_reach_the_program(self) -> None:
        fit = answer(packaged("sft_cpm9g_command", "model=cpm-9g-100b"))
        assert fit.does_not_fit
        assert fit.advice == () and not fit.nothing_helps
        assert "change a figure there and in the program" in fit.notes[0]


def test_the_verdict_says_that_it_is_of_the_description() -> None:
    fit = answer(packaged("infer_10b"))
    assert fit.told == "fits, as workload describes it"
    assert fit.notes == (AS_DESCRIBED,)


def test_nothing_is_suggested_for_options_that_only_the_program_knows() -> None:
    with pytest.raises(NoSuggestion):
        suggest(packaged("sft_cpm9g_command"))
