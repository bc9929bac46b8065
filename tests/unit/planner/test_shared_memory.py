"""The size of /dev/shm: as stated, or from NCCL's segments, and never under the manual's 4 GiB."""

from __future__ import annotations

from pathlib import Path

import pytest
from planned_jobs import GIB, packaged, small

from cpm_cluster.planner.shared_memory import NCCL_SEGMENT_BYTES, shared_memory


def test_a_segment_of_nccl_has_the_size_that_its_users_report() -> None:
    """nccl#290, nccl#1518: failed to extend … to 9637888"""
    assert NCCL_SEGMENT_BYTES == 9_637_888


class TestComputed:
    def test_with_nvlink_the_manuals_4g_is_more_than_enough(self) -> None:
        size = shared_memory(packaged("lora_100b"))
        assert (size.bytes, size.set_by) == (4 * GIB, "computed")
        # 8 × 2 × 3 × 9,637,888 B
        assert "8 GPUs × 2 channels × 3 × 9,637,888 B = 441.2 MiB, × 1.5, at least the manual's 4 GiB" in size.why

    def test_without_it_all_traffic_of_a_node_goes_through_it(self, tmp_path: Path) -> None:
        """1.5 × 8 × 16 × 3 × 9,637,888 B = 5.17 GiB, in whole GiB"""
        assert shared_memory(small(tmp_path, site="gpu: l40s-48g")).bytes == 6 * GIB

    @pytest.mark.parametrize(("nvlink", "gib"), [("true", 4), ("false", 6)])
    def test_the_cluster_knows_better_than_the_catalogue_of_gpus(self, nvlink: str, gib: int, tmp_path: Path) -> None:
        spec = small(tmp_path, site=f"gpu: a100-80g\nnvlink: {nvlink}")
        assert shared_memory(spec).bytes == gib * GIB

    def test_an_unknown_gpu_is_taken_to_have_none(self, tmp_path: Path) -> None:
        assert shared_memory(small(tmp_path, site="")).bytes == 6 * GIB

    @pytest.mark.parametrize(("gpus", "gib"), [(0, 4), (1, 4), (6, 4), (7, 5), (8, 6), (16, 11)])
    def test_it_grows_with_the_gpus_of_a_node_in_whole_gib(self, gpus: int, gib: int, tmp_path: Path) -> None:
        spec = small(tmp_path, "engine=torch", "training.precision=fp32", site="gpu: l40s-48g", gpus=gpus)
        assert shared_memory(spec).bytes == gib * GIB

    def test_it_is_no_more_than_the_job_has(self, tmp_path: Path) -> None:
        """It is a limit, whose pages count in the job's memory: a small job needs no more for it."""
        size = shared_memory(small(tmp_path, "training.precision=fp32", "resources.memory_per_node=1G", gpus=0))
        assert size.bytes == 1 * GIB
        assert size.why.endswith("but no more than resources.memory_per_node")


class TestStated:
    def test_a_size_of_the_job_is_taken_as_it_is(self, tmp_path: Path) -> None:
        size = shared_memory(small(tmp_path, "resources.shm=1500MiB"))
        assert size.bytes == 1500 << 20
        assert (size.set_by, size.why) == ("--set", "as stated in resources.shm")
