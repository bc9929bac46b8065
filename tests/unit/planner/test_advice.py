"""What would make a job fit: every proposal does, says what it costs, and can be typed as it stands."""

from __future__ import annotations

from pathlib import Path

import pytest
from planned_jobs import CATALOGUE, JOBS, packaged, small

from cpm_cluster.planner.answer import answer
from cpm_cluster.planner.fit import Advice
from cpm_cluster.specs.compose import load_job
from cpm_cluster.specs.job import JobSpec

# (job, what makes it too large)
TOO_LARGE = [
    ("full_100b", ("profile=lora-100b-8x80g",)),
    ("full_10b", ("profile=minimal-train-10b",)),
    ("lora_100b", ("resources.gpus_per_node=2",)),
    ("lora_10b", ("method=full", "training.micro_batch=8")),
    ("pretrain_10b", ("training.micro_batch=96",)),
    ("full_10b", ("resources.memory_per_node=16G",)),
    ("full_10b", ("training.grad_accum=512", "time_limit=11m")),
]


def advice_on(spec: JobSpec) -> tuple[Advice, ...]:
    return answer(spec).advice


LONG_BATCHES = ("training.micro_batch=32",)


class TestEveryProposal:
    @pytest.mark.parametrize(("job", "overrides"), TOO_LARGE)
    def test_makes_the_job_fit_when_typed(self, job: str, overrides: tuple[str, ...]) -> None:
        before = answer(packaged(job, *overrides))
        assert before.does_not_fit
        assert before.advice
        for advice in before.advice:
            after = answer(load_job(JOBS / f"{job}.yaml", (*overrides, *advice.overrides), CATALOGUE, "slurm"))
            assert after.verdict == advice.verdict, advice
            assert after.verdict in ("fits", "tight")

    def test_says_what_it_saves_and_costs(self) -> None:
        (more, *_, lora) = advice_on(packaged("full_100b", "profile=lora-100b-8x80g"))
        assert more.change == "32 GPUs instead of 8"
        assert more.overrides == ("resources.nodes=4", "training.grad_accum=1")
        assert "GPU memory −" in more.effect and "% time" in more.effect and "price" in more.effect
        assert "LoRA" in lora.change  # changes what is trained, so it comes last

    def test_says_where_its_cost_is_of_as_many_tokens_and_not_of_the_run(self) -> None:
        """A run of shorter sequences has fewer; one that accumulates more has the same."""
        found = {advice.change.split()[0]: advice.effect for advice in advice_on(packaged("full_10b", *LONG_BATCHES))}
        assert found["sequences"].endswith(" for as many tokens")
        assert found["micro"].endswith(" price")

    def test_what_fits_gets_none(self) -> None:
        assert advice_on(packaged("full_100b")) == ()


class TestChanges:
    def test_a_smaller_micro_batch_is_cheaper_than_recomputation(self, tmp_path: Path) -> None:
        wide = ("engine=torch", "training.micro_batch=64", "training.seq_len=4096")
        found = advice_on(small(tmp_path, *wide, gpus=1, site="gpu: a100-80g\nnodes: 1\ngpus_per_node: 1"))
        assert found[0].change.startswith("micro batch 64 → ")
        assert all(advice.verdict != "tight" for advice in found)

    def test_copies_are_to_be_sharded(self, tmp_path: Path) -> None:
        found = advice_on(small(tmp_path, "model.layers=100", "engine=torch", "training.zero_stage=0"))
        assert any("training.zero_stage=" in " ".join(advice.overrides) for advice in found)

    def test_what_the_engine_or_the_cluster_cannot_do_is_not_proposed(self, tmp_path: Path) -> None:
        site = "gpu: a100-80g\nnodes: 2\ngpus_per_node: 8"
        found = advice_on(small(tmp_path, "model.layers=300", "engine=torch", site=site))
        said = " ".join(" ".join(advice.overrides) for advice in found)
        assert "offload" not in said
        assert "nodes=4" not in said

    def test_changes_come_together_where_one_does_not_do(self, tmp_path: Path) -> None:
        site = "gpu: a10g-24g\nnodes: 1\ngpus_per_node: 8"
        big = ("model.layers=30", "training.micro_batch=32", "engine=torch", "training.zero_stage=0")
        found = advice_on(small(tmp_path, *big, site=site))
        assert found
        assert all(len(advice.overrides) > 1 for advice in found)

    def test_a_step_that_is_longer_than_the_time_limit_needs_a_longer_one(self) -> None:
        found = advice_on(packaged("full_10b", "training.grad_accum=512", "time_limit=11m"))
        assert found[0].overrides == ("time_limit=2640s",)
        assert "11 min" in found[0].change

    def test_shorter_sequences_come_after_what_leaves_the_training_as_it_is(self, tmp_path: Path) -> None:
        long = ("engine=torch", "training.seq_len=1048576", "training.recompute=full")
        found = advice_on(small(tmp_path, *long, gpus=1, site="gpu: a100-80g\nnodes: 1\ngpus_per_node: 1"))
        assert any("training.seq_len=" in " ".join(advice.overrides) for advice in found)

    def test_where_nothing_helps_nothing_is_proposed(self, tmp_path: Path) -> None:
        site = "gpu: a10g-24g\nnodes: 1\ngpus_per_node: 1"
        assert advice_on(small(tmp_path, "model.layers=9000", site=site, gpus=1)) == ()

    def test_a_tight_job_is_told_how_to_be_safe(self) -> None:
        spec = packaged("full_10b", "profile=minimal-train-10b", "training.offload_optimizer=true")
        assert answer(spec).verdict == "tight"
        assert all(advice.verdict == "fits" for advice in advice_on(spec))
