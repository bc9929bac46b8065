"""What is worth running instead: all of it fits, none is beaten, and each can be typed as it stands."""

from __future__ import annotations

from pathlib import Path

import pytest
from planned_jobs import CATALOGUE, JOBS, packaged, small

from cpm_cluster.planner.answer import answer
from cpm_cluster.planner.suggest import BATCH_WITHIN, NoSuggestion, Option, suggest
from cpm_cluster.specs.compose import load_job

SEARCHED = ("full_100b", "full_10b", "lora_100b", "pretrain_10b")


class TestEveryOption:
    @pytest.mark.parametrize("job", SEARCHED)
    def test_fits_and_takes_as_long_as_it_says_when_typed(self, job: str) -> None:
        for option in suggest(packaged(job)).options:
            typed = load_job(JOBS / f"{job}.yaml", option.overrides, CATALOGUE, "slurm")
            fit = answer(typed)
            assert fit.verdict == "fits", option
            assert fit.time and fit.time.seconds == pytest.approx(option.seconds)
            assert fit.cost and fit.cost.gpu_hours.value == pytest.approx(option.gpu_hours)
            assert typed.resources.nodes * typed.resources.gpus_per_node == option.gpus

    @pytest.mark.parametrize("job", SEARCHED)
    def test_sees_the_tokens_of_the_job_in_steps_of_about_its_size(self, job: str) -> None:
        spec = packaged(job)
        batch = spec.training.micro_batch * spec.training.grad_accum * spec.resources.world_size
        for option in suggest(spec).options:
            sequences = option.micro_batch * option.grad_accum * option.gpus
            assert sequences == pytest.approx(batch, rel=BATCH_WITHIN)
            assert spec.training.steps * batch <= option.steps * sequences < (spec.training.steps + 2) * batch

    def test_is_beaten_by_no_other(self) -> None:
        options = suggest(packaged("full_100b")).options
        assert len(options) > 2

        def beats(one: Option, other: Option) -> bool:
            return one.seconds < other.seconds and one.gpu_hours < other.gpu_hours and one.gpus <= other.gpus

        assert not [(one, other) for one in options for other in options if beats(one, other)]


class TestSearch:
    def test_the_objective_says_what_comes_first(self) -> None:
        spec = packaged("full_10b")
        by_time = suggest(spec, objective="time").options
        assert by_time[0].seconds == min(option.seconds for option in by_time)
        by_cost = suggest(spec, objective="cost").options
        assert by_cost[0].gpu_hours == pytest.approx(min(option.gpu_hours for option in by_cost), rel=0.02)
        by_gpus = suggest(spec, objective="gpus").options
        assert by_gpus[0].gpus == min(option.gpus for option in by_gpus)
        assert set(by_time) == set(by_cost) == set(by_gpus)

    def test_keeps_to_the_gpus_that_are_asked_for(self) -> None:
        assert {option.gpus for option in suggest(packaged("full_10b"), gpus=32).options} == {32}

    def test_and_to_those_that_the_cluster_has(self, tmp_path: Path) -> None:
        spec = small(tmp_path, site="gpu: a100-80g\nnodes: 3\ngpus_per_node: 4", gpus=4)
        assert {option.nodes for option in suggest(spec).options} <= {1, 2, 3}
        with pytest.raises(NoSuggestion, match="it has 1, 2, 4, 8, 12$"):
            suggest(spec, gpus=16)

    def test_tries_ranks_of_lora_and_counts_a_higher_one_as_a_gain(self) -> None:
        options = suggest(packaged("lora_100b")).options
        assert {8, 64, 128} <= {option.lora_rank for option in options}

    def test_keeps_the_rank_of_an_adapter_to_begin_with(self) -> None:
        options = suggest(packaged("lora_100b", "method.lora.init_from=/CPM-9G/adapter")).options
        assert {option.lora_rank for option in options} == {packaged("lora_100b").method.rank}

    def test_thousands_of_configurations_are_considered(self, tmp_path: Path) -> None:
        many = ("engine=deepspeed", "method=lora", "training.grad_accum=64")
        found = suggest(small(tmp_path, *many, site="gpu: a100-80g\nnodes: 32\ngpus_per_node: 8"))
        assert found.considered >= 2000
        assert found.planned <= found.considered

    def test_finds_nothing_where_nothing_fits(self, tmp_path: Path) -> None:
        spec = small(tmp_path, "model.layers=9000", site="gpu: a10g-24g\nnodes: 1\ngpus_per_node: 1", gpus=1)
        assert suggest(spec).options == ()

    @pytest.mark.parametrize("job", ["quickstart", "sft_cpm9g_command"])
    def test_of_what_is_not_judged_says_so(self, job: str) -> None:
        with pytest.raises(NoSuggestion, match="nothing can be suggested"):
            suggest(packaged(job))
