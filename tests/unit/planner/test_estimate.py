"""What can be said before submission: lower bounds of memory, with the formulas that gave them."""

from __future__ import annotations

from pathlib import Path

import pytest
from planned_jobs import GIB, SMALL, N, packaged, small

from cpm_cluster.planner.estimate import estimate, trained_parameters
from cpm_cluster.planner.fit import Component, Demand, Fit
from cpm_cluster.specs.job import JobSpec


def _demand(spec: JobSpec, resource: str) -> Demand:
    (found,) = [demand for demand in estimate(spec).demands if demand.resource == resource]
    return found


def _parts(spec: JobSpec, resource: str = "GPU memory") -> dict[str, tuple[int, str]]:
    return {part.name: (part.bytes, part.formula) for part in _demand(spec, resource).components}


class TestManual:
    """The 100B rows of the CPM-9G manual: full tuning needs 64 × 80 GB, on eight it went out of memory."""

    def test_full_tuning_of_100b_on_eight_gpus_is_ruled_out_and_says_what_would_do(self) -> None:
        fit = estimate(packaged("full_100b", "profile=lora-100b-8x80g"))
        assert fit.ruled_out
        assert fit.advice == (
            "GPU memory: at least 163.3 GiB for each GPU, but there are 79.3 GiB; use 3 nodes or more, method: lora,"
            " training.offload_optimizer: true or a GPU with more memory",
        )

    def test_the_number_of_nodes_that_it_names_is_not_ruled_out(self) -> None:
        eight = ("profile=full-100b-64x80g", "resources.nodes=3")
        assert not estimate(packaged("full_100b", *eight)).ruled_out
        assert estimate(packaged("full_100b", "profile=full-100b-64x80g", "resources.nodes=2")).ruled_out

    def test_nor_is_the_one_that_the_manual_recommends(self) -> None:
        fit = estimate(packaged("full_100b"))
        assert not fit.ruled_out
        assert fit.advice == ()

    def test_lora_of_100b_on_eight_gpus_is_not_ruled_out(self) -> None:
        demand = _demand(packaged("lora_100b"), "GPU memory")
        assert demand.verdict == "not ruled out"
        assert 24 * GIB < demand.lower_bytes < 26 * GIB  # 2 B × 100e9 / 8, and the adapters

    def test_offloading_adam_moves_it_to_the_host_of_one_node_which_is_too_small(self) -> None:
        spec = packaged("full_100b", "profile=lora-100b-8x80g", "training.offload_optimizer=true")
        assert spec.model
        gpu, host = _demand(spec, "GPU memory"), _demand(spec, "host memory")
        assert gpu.lower_bytes == 2 * (2 * spec.model.parameters // 8)
        assert host.lower_bytes == pytest.approx(16 * spec.model.parameters, abs=8)
        assert (gpu.verdict, host.verdict) == ("not ruled out", "does not fit")
        assert estimate(spec).advice == (
            "host memory: at least 1.5 TiB for each node, but there are 512 GiB; use 3 nodes or more,"
            " training.offload_optimizer: false or method: lora",
        )

    def test_the_least_that_trained_10b_is_not_ruled_out(self) -> None:
        """140 GB of host memory and 49 GB of one GPU, with AdamOffload."""
        fit = estimate(packaged("full_10b", "profile=minimal-train-10b", "training.offload_optimizer=true"))
        assert not fit.ruled_out
        gpu, host = fit.demands[:2]
        assert gpu.lower_bytes < 49 * GIB
        assert host.lower_bytes < 140 * GIB


class TestFormulas:
    """Bytes for each of N parameters, on each of n = 8 ranks."""

    @pytest.mark.parametrize(
        ("overrides", "expected"),
        [
            (
                ["engine=bmtrain", "training.precision=fp16"],
                {
                    "trained weights": (2 * N // 8, "2T/8"),
                    "gradients": (2 * N // 8, "2T/8"),
                    "Adam": (10 * N // 8, "10T/8 (moments 2 + 4, master copy 4: bmtrain/optim/adam.py)"),
                },
            ),
            (
                ["engine=bmtrain", "training.precision=bf16"],
                {
                    "trained weights": (2 * N // 8, "2T/8"),
                    "gradients": (2 * N // 8, "2T/8"),
                    "Adam": (
                        12 * N // 8,
                        "12T/8 (moments 4 + 4, master copy 4: mixed precision, Rajbhandari et al. 2020)",
                    ),
                },
            ),
            (
                ["engine=torch", "training.zero_stage=0"],
                {
                    "trained weights": (4 * N, "4T"),
                    "gradients": (4 * N, "4T"),
                    "Adam": (8 * N, "8T (moments in fp32)"),
                },
            ),
            (
                ["engine=torch", "training.zero_stage=2"],
                {
                    "trained weights": (4 * N // 8, "4T/8"),
                    "gradients": (4 * N // 8, "4T/8"),
                    "Adam": (8 * N // 8, "8T/8 (moments in fp32)"),
                },
            ),
        ],
    )
    def test_are_named_with_their_source(
        self, overrides: list[str], expected: dict[str, tuple[int, str]], tmp_path: Path
    ) -> None:
        assert _parts(small(tmp_path, *overrides)) == expected

    @pytest.mark.parametrize(
        ("stage", "weights", "gradients", "adam"), [(0, 1, 1, 1), (1, 1, 1, 8), (2, 1, 8, 8), (3, 8, 8, 8)]
    )
    def test_each_stage_of_zero_shards_one_thing_more(
        self, stage: int, weights: int, gradients: int, adam: int, tmp_path: Path
    ) -> None:
        parts = _parts(small(tmp_path, "engine=deepspeed", f"training.zero_stage={stage}"))
        assert [size for size, _ in parts.values()] == [2 * N // weights, 2 * N // gradients, 12 * N // adam]

    def test_what_bmtrain_offloads_is_16_bytes_a_parameter_on_the_host(self, tmp_path: Path) -> None:
        spec = small(tmp_path, "engine=bmtrain", "training.offload_optimizer=true")
        assert list(_parts(spec)) == ["trained weights", "gradients"]
        ((size, formula),) = _parts(spec, "host memory").values()
        assert size == 8 * (16 * N // 8)
        assert formula.startswith("8 ranks × 16T/8 (AdamOffload:")
        assert formula.endswith("bmtrain/optim/adam_offload.py)")

    def test_deepspeed_offloads_the_gradients_too(self, tmp_path: Path) -> None:
        spec = small(tmp_path, "engine=deepspeed", "training.offload_optimizer=true", "training.zero_stage=2")
        assert _parts(spec) == {"trained weights": (2 * N, "2T")}
        assert _demand(spec, "host memory").lower_bytes == 16 * N

    def test_more_nodes_share_the_host_memory(self, tmp_path: Path) -> None:
        spec = small(tmp_path, "engine=bmtrain", "training.offload_optimizer=true", "resources.nodes=4")
        assert _demand(spec, "host memory").lower_bytes == 8 * (16 * N // 32)

    def test_lora_trains_r_times_in_plus_out_and_keeps_the_rest_frozen(self, tmp_path: Path) -> None:
        lora = "method={lora: {rank: 4, targets: [project_q, w_out]}}"
        spec = small(tmp_path, "engine=bmtrain", lora)
        assert spec.model
        adapters = 10 * 4 * ((2048 + 2048) + (8192 + 2048))
        assert trained_parameters(spec, spec.model) == adapters
        parts = _parts(spec)
        assert parts["frozen weights"] == (2 * N // 8, "2N/8")
        assert parts["trained weights"] == (2 * adapters // 8, "2T/8")

    def test_without_gpus_all_of_it_is_on_the_host(self, tmp_path: Path) -> None:
        cpu = ("training.precision=fp32", "training.zero_stage=0", "resources.processes_per_node=2")
        demand = _demand(small(tmp_path, *cpu, gpus=0), "host memory")
        assert demand.lower_bytes == 2 * 16 * N
        assert demand.verdict == "capacity unknown"

    def test_checkpoints_are_those_that_are_kept_and_the_one_being_written(self, tmp_path: Path) -> None:
        spec = small(tmp_path, "training.checkpoint.keep=3")
        assert _parts(spec, "disk") == {"checkpoints": (12 * N * 4, "12T × 4 (keep 3, one being written)")}


class TestWhatIsNotKnown:
    def test_a_program_of_the_users_own_is_not_judged(self) -> None:
        assert [demand.resource for demand in estimate(packaged("sft_cpm9g_command")).demands] == ["/dev/shm"]

    def test_nor_a_gpu_that_nobody_named(self, tmp_path: Path) -> None:
        assert _demand(small(tmp_path, site=""), "GPU memory").verdict == "capacity unknown"

    def test_where_no_container_limits_dev_shm_nothing_is_said_of_it(self, tmp_path: Path) -> None:
        of_the_node = small(tmp_path, "container.ipc=host")
        no_container = small(tmp_path, job="".join(line for line in SMALL.splitlines(True) if "image" not in line))
        for spec in (of_the_node, no_container):
            assert "/dev/shm" not in [demand.resource for demand in estimate(spec).demands]


class TestAdvice:
    """Only what is not in force yet."""

    def test_copies_are_to_be_sharded_first(self, tmp_path: Path) -> None:
        """More GPUs would each hold the whole again."""
        wide = ("model.layers=200", "engine=torch", "training.zero_stage=0")
        (advice,) = estimate(small(tmp_path, *wide)).advice
        assert advice.endswith("use training.zero_stage: 3, method: lora or a GPU with more memory")

    def test_what_the_engine_cannot_do_is_not_proposed(self, tmp_path: Path) -> None:
        (advice,) = estimate(small(tmp_path, "model.layers=2000", "engine=torch")).advice
        assert "offload" not in advice
        assert "nodes or more" in advice


class TestVerdict:
    @pytest.mark.parametrize(
        ("capacity", "upper", "verdict"),
        [
            (None, 10, "capacity unknown"),
            (9, None, "does not fit"),
            (9, 20, "does not fit"),
            (10, None, "not ruled out"),
            (15, 20, "not ruled out"),
            (20, 20, "fits"),
        ],
    )
    def test_a_lower_bound_rules_out_and_only_an_upper_one_promises(
        self, capacity: int | None, upper: int | None, verdict: str
    ) -> None:
        parts = (Component("a", 4, "4"), Component("b", 6, "6"))
        demand = Demand("disk", "node", "always", parts, capacity, upper)
        assert demand.verdict == verdict
        assert Fit((demand,), ()).ruled_out == (verdict == "does not fit")

    @pytest.mark.parametrize(("upper", "text"), [(None, "at least 10 B"), (20, "20 B")])
    def test_its_size_says_which_of_the_two_it_is(self, upper: int | None, text: str) -> None:
        assert Demand("disk", "run", "always", (Component("a", 10, "10"),), None, upper).size == text
