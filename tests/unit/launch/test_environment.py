"""The environment of the training: what is set, who set it, and who wins."""

from __future__ import annotations

from pathlib import Path

import pytest
from launch_jobs import MINIMAL, RUN_DIR, SITE, packaged, written

from cpm_cluster.launch.plan import Setting


def _environment(folder: Path, *overrides: str, job: str = MINIMAL, site: str = SITE) -> dict[str, Setting]:
    return {setting.name: setting for setting in written(folder, job, *overrides, site=site).plan.environment}


def _names(folder: Path, *overrides: str, job: str = MINIMAL) -> set[str]:
    return set(_environment(folder, *overrides, job=job))


class TestPrecedence:
    """Computed, then the cluster, then the job; the image's own ENV lines lie below and stay in the image."""

    def test_without_anybodys_word_it_is_computed(self, tmp_path: Path) -> None:
        site = SITE.replace(", NCCL_DEBUG: INFO", "")
        debug = _environment(tmp_path, site=site)["NCCL_DEBUG"]
        assert (debug.value, debug.set_by) == ("WARN", "computed")
        assert "diagnosis reads" in debug.why

    def test_the_cluster_wins_over_it(self, tmp_path: Path) -> None:
        debug = _environment(tmp_path)["NCCL_DEBUG"]
        assert (debug.value, debug.set_by) == ("INFO", f"cluster ({tmp_path}/site.yaml:18:40)")

    def test_the_job_wins_over_the_cluster(self, tmp_path: Path) -> None:
        debug = _environment(tmp_path, job=MINIMAL + "env: {NCCL_DEBUG: TRACE}\n")["NCCL_DEBUG"]
        assert (debug.value, debug.set_by) == ("TRACE", f"job ({tmp_path}/job.yaml:9:19)")

    def test_the_command_line_wins_over_the_job(self, tmp_path: Path) -> None:
        job = MINIMAL + "env: {NCCL_DEBUG: TRACE}\n"
        debug = _environment(tmp_path, "env.NCCL_DEBUG=VERSION", job=job)["NCCL_DEBUG"]
        assert (debug.value, debug.set_by) == ("VERSION", "--set")

    def test_each_variable_is_there_once_in_the_order_of_names(self, tmp_path: Path) -> None:
        plan = written(tmp_path, MINIMAL, "env.NCCL_DEBUG=TRACE", "env.A=1").plan
        names = [setting.name for setting in plan.environment]
        assert names == sorted(set(names))

    def test_what_the_image_sets_stays_in_the_image(self, tmp_path: Path) -> None:
        job = MINIMAL.replace("cpmlive-flash:0.0.4", "{base: cpmlive-flash:0.0.4, env: {FROM_IMAGE: 1}}")
        assert "FROM_IMAGE" not in _names(tmp_path, job=job)


class TestTrainer:
    def test_the_trainers_snapshot_is_found_before_anything_in_the_image(self, tmp_path: Path) -> None:
        assert _environment(tmp_path)["PYTHONPATH"].value == f"{RUN_DIR}/package"

    def test_a_command_brings_its_own_code(self, tmp_path: Path) -> None:
        assert "PYTHONPATH" not in _names(tmp_path, "engine=command", "command=[python, x.py]")

    @pytest.mark.parametrize(("cpus", "threads"), [(None, "16"), (96, "48"), (1, "1")])
    def test_each_rank_has_its_share_of_the_threads(self, cpus: int | None, threads: str, tmp_path: Path) -> None:
        """128 CPUs × 2 of 8 GPUs = 32 for two ranks, unless the job says otherwise."""
        overrides = [f"resources.cpus_per_node={cpus}"] if cpus else []
        assert _environment(tmp_path, *overrides)["OMP_NUM_THREADS"].value == threads

    def test_where_nobody_knows_the_cpus_it_is_one(self, tmp_path: Path) -> None:
        site = SITE.replace("cpus_per_node: 128\n", "")
        assert _environment(tmp_path, site=site)["OMP_NUM_THREADS"].value == "1"


class TestNccl:
    def test_several_nodes_are_told_the_interfaces_of_the_cluster(self, tmp_path: Path) -> None:
        found = _environment(tmp_path, "resources.nodes=2", "runtime=docker")
        assert found["NCCL_SOCKET_IFNAME"].value == "=ib0,ib1"
        assert found["GLOO_SOCKET_IFNAME"].value == "ib0"  # Gloo takes whole names, without NCCL's signs
        assert found["NCCL_SOCKET_IFNAME"].set_by.startswith(f"cluster ({tmp_path}/site.yaml:")

    def test_gloo_cannot_be_told_what_to_leave_out(self, tmp_path: Path) -> None:
        site = SITE.replace('"=ib0,ib1"', '"^docker,lo"')
        found = _environment(tmp_path, "resources.nodes=2", "runtime=docker", site=site)
        assert found["NCCL_SOCKET_IFNAME"].value == "^docker,lo"
        assert "GLOO_SOCKET_IFNAME" not in found

    def test_one_node_finds_its_way(self, tmp_path: Path) -> None:
        """Inside rootless Docker before 29.5 there is no ib0 at all."""
        assert not {"NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"} & _names(tmp_path)

    def test_the_topology_file_is_named_and_mounted(self, tmp_path: Path) -> None:
        plan = written(tmp_path, MINIMAL).plan
        (setting,) = [s for s in plan.environment if s.name == "NCCL_TOPO_FILE"]
        assert plan.container
        assert setting.value in [mount.target for mount in plan.container.mounts]

    @pytest.mark.parametrize(
        ("image", "names"),
        [
            ("{base: cpmlive-flash:0.0.4, torch: 1.13.1}", {"NCCL_ASYNC_ERROR_HANDLING"}),
            ("{base: cpmlive-flash:0.0.4, torch: 2.1.2}", {"NCCL_ASYNC_ERROR_HANDLING"}),
            ("{base: cpmlive-flash:0.0.4, torch: 2.2.0}", {"TORCH_NCCL_ASYNC_ERROR_HANDLING"}),
            ("{tag: mine:1}", {"NCCL_ASYNC_ERROR_HANDLING", "TORCH_NCCL_ASYNC_ERROR_HANDLING"}),
        ],
    )
    def test_torch_is_told_under_the_name_that_its_version_reads(
        self, image: str, names: set[str], tmp_path: Path
    ) -> None:
        job = MINIMAL.replace("cpmlive-flash:0.0.4", image)
        assert {name for name in _names(tmp_path, "engine=torch", job=job) if "ASYNC" in name} == names

    def test_bmtrain_calls_nccl_itself(self, tmp_path: Path) -> None:
        assert not [name for name in _names(tmp_path) if "ASYNC" in name]

    def test_without_gpus_there_is_no_nccl(self, tmp_path: Path) -> None:
        site = SITE.replace("env: {NCCL_IB_TIMEOUT: 22, NCCL_DEBUG: INFO}\n", "")
        cpu = ("engine=torch", "training.precision=fp32", "resources.gpus_per_node=0")
        assert not [name for name in _environment(tmp_path, *cpu, site=site) if "NCCL" in name]

    def test_ranks_on_this_machine_meet_on_loopback(self) -> None:
        found = {setting.name: setting.value for setting in packaged("quickstart", "cluster=local").plan.environment}
        assert found["GLOO_SOCKET_IFNAME"] == "lo"
