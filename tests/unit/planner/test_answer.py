"""The answer before the queue: does it fit, how long, at what price."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from planned_jobs import GIB, JOBS, SMALL, N, packaged, small

from cpm_cluster.planner.answer import NO_RATE, NO_RATE_YET, NOT_JUDGED, UNKNOWN_GPU, answer
from cpm_cluster.planner.fit import Component, Demand, Fit, RunTime
from cpm_cluster.specs.job import JobSpec

COMMANDS = {"infer_100b", "infer_10b", *(f"{script}_cpm9g_command" for script in ("pretrain", "sft", "lora"))}
ON_8_GPUS = "profile=lora-100b-8x80g"


def demand_of(spec: JobSpec, resource: str) -> Demand:
    (found,) = [demand for demand in answer(spec).demands if demand.resource == resource]
    return found


def bytes_of(demand: Demand, name: str) -> int:
    return sum(part.bytes for part in demand.components if part.name == name)


def time_of(spec: JobSpec) -> RunTime:
    time = answer(spec).time
    assert time is not None
    return time


class TestPackagedJobs:
    @pytest.mark.parametrize("job", sorted(path.stem for path in JOBS.glob("*.yaml")))
    def test_fit_on_their_own_profiles(self, job: str) -> None:
        fit = answer(packaged(job))
        assert fit.verdict == "fits", fit.shortages("tight") + fit.shortages()
        assert fit.advice == ()

    @pytest.mark.parametrize("job", sorted(COMMANDS))
    def test_of_a_program_that_is_not_described_are_not_judged_and_not_refused(self, job: str) -> None:
        fit = answer(replace(packaged(job), workload=None))
        assert {demand.resource for demand in fit.demands} <= {"/dev/shm"}
        assert not fit.does_not_fit
        assert fit.notes == (NOT_JUDGED,)


class TestManual:
    """The rows of the CPM-9G manual: recommended resources, and its table of extreme minima."""

    def test_full_tuning_of_100b_on_eight_gpus_does_not_fit_and_its_states_are_why(self) -> None:
        """Its own footnote: out of memory on the way."""
        spec = packaged("full_100b", ON_8_GPUS)
        fit, demand = answer(spec), demand_of(spec, "GPU memory")
        assert fit.does_not_fit
        assert demand.low_bytes > 150 * GIB
        states = sum(bytes_of(demand, name) for name in ("weights", "gradients", "master copy and moments"))
        assert states > (demand.capacity_bytes or 0)
        assert "GPU memory" in fit.shortages()[0]

    def test_nor_on_the_least_that_it_states(self) -> None:
        assert answer(packaged("full_100b", "profile=minimal-train-100b")).does_not_fit

    def test_the_least_for_10b_is_about_49_gb_of_a_gpu_and_140_gb_of_the_host(self) -> None:
        spec = packaged("full_10b", "profile=minimal-train-10b", "training.offload_optimizer=true")
        assert demand_of(spec, "GPU memory").bytes == pytest.approx(49e9, rel=0.1)
        assert demand_of(spec, "host memory").bytes == pytest.approx(140e9, rel=0.1)
        assert not answer(spec).does_not_fit


class TestGpuMemory:
    def test_its_parts_add_up_and_lie_within_the_interval(self) -> None:
        for job in ("full_100b", "lora_10b", "pretrain_10b"):
            demand = demand_of(packaged(job), "GPU memory")
            assert demand.low_bytes < demand.bytes < demand.high_bytes
            assert all(part.formula and part.source for part in demand.components)

    @pytest.mark.parametrize(
        ("stage", "torch", "ranks"),
        [(0, "2.7.1", 1), (3, "2.9.0", 8), (3, "2.7.1", 8)],
        ids=["ddp", "fsdp", "old fsdp"],
    )
    def test_our_torch_engine_keeps_frozen_embeddings_in_fp32_and_with_older_fsdp_all(
        self, stage: int, torch: str, ranks: int, tmp_path: Path
    ) -> None:
        lora = ("engine=torch", f"training.zero_stage={stage}", "method=lora")
        image = (f"image={{tag: mine, torch: {torch}}}", "runtime=docker")
        spec = small(tmp_path, *lora, *image)
        assert spec.model
        wide = N if (stage, torch) == (3, "2.7.1") else spec.model.vocab * spec.model.hidden
        demand = demand_of(spec, "GPU memory")
        assert bytes_of(demand, "frozen weights") == pytest.approx(2 * N / ranks)
        assert bytes_of(demand, "frozen weights in fp32") == pytest.approx(2 * wide / ranks)

    def test_is_not_judged_on_a_card_that_nobody_named(self, tmp_path: Path) -> None:
        spec = small(tmp_path, site="")
        assert demand_of(spec, "GPU memory").verdict == "capacity unknown"
        assert answer(spec).notes == (UNKNOWN_GPU,)
        assert answer(spec).time is None


class TestHostMemory:
    def test_what_bmtrain_offloads_is_16_bytes_a_parameter_over_all_nodes(self, tmp_path: Path) -> None:
        offload = ("engine=bmtrain", "training.offload_optimizer=true", "model.layers=100")
        for nodes in (1, 4):
            spec = small(tmp_path, *offload, f"resources.nodes={nodes}")
            demand = demand_of(spec, "host memory")
            assert spec.model
            parts = ("master copy and moments", "pinned weights and gradients")
            offloaded = sum(bytes_of(demand, name) for name in parts)
            assert offloaded == pytest.approx(16 * spec.model.parameters / nodes, rel=1e-6)

    def test_our_torch_engine_copies_its_state_before_it_is_written(self, tmp_path: Path) -> None:
        spec = small(tmp_path, "engine=torch", "model.layers=1000", gpus=1)
        assert spec.model
        demand = demand_of(spec, "host memory")
        assert demand.instant == "saving"
        assert bytes_of(demand, "state copied for checkpoints") == 12 * spec.model.parameters

    def test_without_gpus_every_rank_holds_it_all_there(self, tmp_path: Path) -> None:
        cpu = ("training.precision=fp32", "training.zero_stage=0", "resources.processes_per_node=2")
        demand = demand_of(small(tmp_path, *cpu, gpus=0), "host memory")
        assert bytes_of(demand, "trained weights") == 2 * 4 * N
        assert bytes_of(demand, "Adam moments") == 2 * 8 * N
        assert "GPU memory" not in {d.resource for d in answer(small(tmp_path, *cpu, gpus=0)).demands}


class TestSharedMemory:
    def test_counts_where_a_container_limits_it(self, tmp_path: Path) -> None:
        assert demand_of(packaged("full_10b"), "/dev/shm").bytes == 4 * GIB
        of_the_node = small(tmp_path, "container.ipc=host")
        no_container = small(tmp_path, job="".join(line for line in SMALL.splitlines(True) if "image" not in line))
        for spec in (of_the_node, no_container):
            assert "/dev/shm" not in {demand.resource for demand in answer(spec).demands}


class TestDisk:
    def test_holds_the_checkpoints_that_are_kept_the_one_being_written_and_the_weights(self, tmp_path: Path) -> None:
        demand = demand_of(small(tmp_path, "training.checkpoint.keep=3"), "disk")
        assert demand.bytes == 12 * N * 4 + 4 * N
        assert demand.verdict == "capacity unknown"

    def test_of_a_node_holds_the_image_where_its_size_is_known(self, tmp_path: Path) -> None:
        archive = "image.archive={file: x.tar, bytes: 30000000000}"
        spec = small(tmp_path, archive, "resources.disk=20G")
        assert demand_of(spec, "node disk").verdict == "does not fit"
        assert "node disk" not in {demand.resource for demand in answer(small(tmp_path)).demands}


class TestTime:
    def test_steps_take_as_long_as_there_are_of_them(self) -> None:
        once, twice = time_of(packaged("full_10b")), time_of(packaged("full_10b", "training.steps=2000"))
        assert twice.seconds == pytest.approx(2 * once.seconds)
        assert once.low_s < once.seconds < once.high_s

    def test_a_run_that_slurm_starts_again_fits_in_several_starts(self) -> None:
        time = time_of(packaged("full_10b", "training.steps=100000"))
        assert time.verdict == "fits"
        assert time.segments > 1
        assert f"{time.segments} starts" in time.limit and "Slurm starts it again" in time.limit

    def test_elsewhere_its_owner_must(self) -> None:
        alone = ("cluster=local", "image=null", "runtime=null", "engine=torch", "training.precision=bf16")
        one_node = ("resources.nodes=1", "resources.gpu=a100-80g", "training.attention=auto", "time_limit=1h")
        time = time_of(packaged("full_10b", *alone, *one_node, "training.steps=100000"))
        assert time.verdict == "tight"
        assert "cpm resume" in time.limit

    def test_a_limit_that_not_even_one_step_fits_into_is_refused(self) -> None:
        fit = answer(packaged("full_100b", "training.grad_accum=4096", "time_limit=31m"))
        assert fit.does_not_fit
        assert [text for text in fit.shortages() if text.startswith("time:")]

    def test_on_cpus_nothing_is_claimed(self) -> None:
        fit = answer(packaged("quickstart"))
        assert (fit.time, fit.cost, fit.notes) == (None, None, (NO_RATE_YET,))

    def test_nor_behind_pretended_gpus(self) -> None:
        there = ("cluster=sandbox", "image=null", "runtime=bare", "engine=torch", "training.attention=auto")
        fit = answer(packaged("full_10b", *there))
        assert (fit.time, fit.notes) == (None, (NO_RATE,))

    def test_the_price_of_the_cluster_goes_before_the_catalogues(self, tmp_path: Path) -> None:
        usual = answer(small(tmp_path)).cost
        own = answer(small(tmp_path, site="gpu: a100-80g\ngpu_price_per_hour_usd: 343")).cost
        assert usual and own and usual.price_usd and own.price_usd
        assert own.price_usd.value == pytest.approx(100 * usual.price_usd.value)


class TestVerdict:
    @pytest.mark.parametrize(
        ("capacity", "verdict"), [(None, "capacity unknown"), (7, "does not fit"), (8, "tight"), (12, "fits")]
    )
    def test_fits_only_what_does_at_the_high_end(self, capacity: int | None, verdict: str) -> None:
        demand = Demand("disk", "node", "always", (Component("a", 4, "4"), Component("b", 6, "6")), capacity, 8, 12)
        assert demand.verdict == verdict
        assert demand.size == "10 B (8 B to 12 B)"
        assert Fit((demand,)).does_not_fit == (verdict == "does not fit")

    def test_of_a_fit_is_the_worst(self) -> None:
        parts = (Component("a", 10, "10"),)
        disk = Demand("disk", "run", "always", parts, None, 10, 10)
        gpu = replace(disk, resource="GPU memory", capacity_bytes=10)
        host = replace(gpu, resource="host memory")
        assert Fit((gpu, host, disk)).verdict == "fits"
        assert Fit((gpu, replace(host, high_bytes=11), disk)).verdict == "tight"
        assert Fit((replace(gpu, low_bytes=11), replace(host, high_bytes=11))).verdict == "does not fit"

    def test_of_a_fit_promises_nothing_where_a_memory_is_not_known(self) -> None:
        parts = (Component("a", 10, "10"),)
        gpu = Demand("GPU memory", "GPU", "always", parts, 10, 10, 10)
        host = replace(gpu, resource="host memory", capacity_bytes=None)
        shm = replace(gpu, resource="/dev/shm")
        assert (Fit((gpu, host)).verdict, Fit((gpu, host)).told) == ("capacity unknown", "fits as far as is known")
        assert (Fit((shm,)).verdict, Fit((shm,)).told) == ("capacity unknown", "not judged")
