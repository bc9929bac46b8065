"""The batch script, run by bash with stand-ins for Slurm's commands on PATH."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest
from launch_jobs import MINIMAL, packaged, written
from slurm_stand_ins import AGENT_PYTHON, StandIns

from cpm_cluster.launch.plan import options
from cpm_cluster.launch.sbatch import agent_argv, batch_script, by_hand, step_argv


@pytest.fixture
def slurm(tmp_path: Path) -> StandIns:
    return StandIns(tmp_path / "stand-ins")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "tune-20260102-030405-00ab"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def one_node(run_dir: Path) -> str:
    return batch_script(packaged("lora_100b", run_dir=run_dir).plan)


@pytest.fixture
def eight_nodes(run_dir: Path) -> str:
    return batch_script(packaged("full_100b", run_dir=run_dir).plan)


def _started(slurm: StandIns) -> None:
    """Wait until the stand-in of srun runs."""
    for _ in range(500):
        if (slurm.folder / "environment").exists():
            return
        time.sleep(0.01)
    raise AssertionError("srun was not called within 5 s")


class TestStep:
    @pytest.mark.parametrize("job", ["lora_100b", "full_100b", "lora_10b"])
    def test_srun_gets_the_argv_of_the_plan(self, job: str, slurm: StandIns, run_dir: Path) -> None:
        plan = packaged(job, run_dir=run_dir).plan
        done = slurm.run(batch_script(plan))
        assert done.returncode == 0, done.stderr
        assert agent_argv(plan) == [AGENT_PYTHON, f"{run_dir}/package", str(run_dir)]
        assert step_argv(plan) == ["srun", *options(plan.step)]
        assert slurm.calls("srun") == [[*options(plan.step), "python3", f"{run_dir}/package", str(run_dir)]]
        assert slurm.left_behind() == []

    def test_pyxis_runs_the_agent_with_the_python_of_the_image(
        self, slurm: StandIns, run_dir: Path, tmp_path: Path
    ) -> None:
        slurm.run(batch_script(written(tmp_path, MINIMAL, "runtime=pyxis", run_dir=run_dir).plan))
        (argv,) = slurm.calls("srun")
        assert argv[-3:] == ["python3", f"{run_dir}/package", str(run_dir)]
        assert "--container-image=dockerd://cpmlive-flash:0.0.4" in argv
        assert f"--container-workdir={run_dir}/code" in argv

    def test_modules_are_loaded_first(self, slurm: StandIns, one_node: str) -> None:
        slurm.run(one_node)
        assert slurm.calls("module") == [["load", "rootless-docker/default"]]

    def test_a_module_that_cannot_be_loaded_ends_the_job_with_a_sentence(self, slurm: StandIns, one_node: str) -> None:
        done = slurm.run(one_node, **{"BASH_FUNC_module%%": "() { echo 'no such module' >&2; return 1; }"})
        assert done.returncode == 1
        said, ours = done.stderr.splitlines()
        assert said == "no such module"
        assert ours.startswith("cpm: a module cannot be loaded on g2001")
        assert slurm.calls("srun") == []

    def test_a_module_system_that_strict_bash_would_end_is_let_live(self, slurm: StandIns, one_node: str) -> None:
        careless = "() { false; : $NOT_SET_ANYWHERE; return 0; }"
        assert slurm.run(one_node, **{"BASH_FUNC_module%%": careless}).returncode == 0


class TestEnvironment:
    def test_what_the_submitting_shell_held_of_another_launch_is_gone(self, slurm: StandIns, eight_nodes: str) -> None:
        stale = dict.fromkeys(("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK"), "7")
        slurm.run(eight_nodes, **stale, MASTER_ADDR="localhost", MASTER_PORT="10010")
        assert not {*stale, "MASTER_ADDR", "MASTER_PORT"} & set(slurm.environment_of_tasks())

    def test_the_tasks_get_ours_also_where_sbatch_exported_nothing(self, slurm: StandIns, eight_nodes: str) -> None:
        """`sbatch --export=NONE` sets this variable, and srun would obey it (man srun)."""
        slurm.run(eight_nodes, SLURM_EXPORT_ENV="NONE")
        assert "SLURM_EXPORT_ENV" not in slurm.environment_of_tasks()

    def test_all_nodes_meet_at_the_first_one(self, slurm: StandIns, eight_nodes: str) -> None:
        slurm.answers(hostnames="".join(f"g{n}\n" for n in range(2001, 2009)))
        slurm.run(eight_nodes)
        assert slurm.calls("scontrol") == [["show", "hostnames", "g[2001-2008]"]]
        assert slurm.calls("getent") == [["ahostsv4", "g2001"]]
        tasks = slurm.environment_of_tasks()
        assert tasks["CPM_MASTER_ADDR"] == "10.77.0.1"
        assert tasks["CPM_MASTER_PORT"] == str(61000 + 4711 % 4536)

    def test_a_node_that_calls_itself_127_0_1_1_is_known_by_its_other_address(
        self, slurm: StandIns, eight_nodes: str
    ) -> None:
        slurm.answers(addresses="127.0.1.1  STREAM g2001\n10.77.0.1  STREAM g2001\n")
        slurm.run(eight_nodes)
        assert slurm.environment_of_tasks()["CPM_MASTER_ADDR"] == "10.77.0.1"

    def test_a_requeued_job_takes_the_next_port(self, slurm: StandIns, eight_nodes: str) -> None:
        slurm.run(eight_nodes, SLURM_RESTART_COUNT="3")
        assert slurm.environment_of_tasks()["CPM_MASTER_PORT"] == str(61000 + 4714 % 4536)

    @pytest.mark.parametrize("job_id", ["1", "4535", "4536", "67108863"])
    def test_the_port_is_above_the_ephemeral_ones_for_every_job(
        self, job_id: str, slurm: StandIns, one_node: str
    ) -> None:
        slurm.run(one_node, SLURM_JOB_ID=job_id)
        assert 61000 <= int(slurm.environment_of_tasks()["CPM_MASTER_PORT"]) <= 65535

    def test_one_node_needs_no_name_service(self, slurm: StandIns, one_node: str) -> None:
        """And rootless Docker before 29.5 would not reach the host's address."""
        slurm.answers(addresses="")
        assert slurm.run(one_node).returncode == 0
        assert slurm.environment_of_tasks()["CPM_MASTER_ADDR"] == "127.0.0.1"
        assert slurm.calls("getent") == []

    @pytest.mark.parametrize("addresses", ["", "127.0.1.1  STREAM g2001\n127.0.1.1  DGRAM\n"])
    def test_a_first_node_that_others_cannot_find_ends_the_job_with_one_line(
        self, addresses: str, slurm: StandIns, eight_nodes: str, run_dir: Path
    ) -> None:
        slurm.answers(addresses=addresses)
        done = slurm.run(eight_nodes)
        assert done.returncode == 1
        (line,) = done.stderr.splitlines()
        assert line.startswith("cpm: g2001 has no address that other nodes reach; mend /etc/hosts or DNS")
        assert done.stdout == ""
        assert slurm.calls("srun") == []
        assert list(run_dir.iterdir()) == []

    def test_attempts_count_up(self, slurm: StandIns, one_node: str, run_dir: Path) -> None:
        seen = []
        for _ in range(3):
            slurm.run(one_node)
            seen.append(slurm.environment_of_tasks()["CPM_ATTEMPT"])
        assert seen == ["1", "2", "3"]
        assert sorted(path.name for path in run_dir.iterdir()) == ["attempt-1", "attempt-2", "attempt-3"]


class TestEnd:
    @pytest.mark.parametrize("code", [0, 1, 2, 3, 135, 137])
    def test_its_exit_code_is_that_of_srun(self, code: int, slurm: StandIns, one_node: str) -> None:
        slurm.answers(exit_code=str(code))
        assert slurm.run(one_node).returncode == code

    def test_before_and_after_the_step_the_agent_is_asked(self, slurm: StandIns, one_node: str, run_dir: Path) -> None:
        slurm.answers(exit_code="85")
        of_run = [f"{run_dir}/package", str(run_dir)]
        slurm.run(one_node)
        assert slurm.calls("python3") == [[*of_run, "end", "85"]]
        slurm.forget()
        done = slurm.run(one_node, SLURM_RESTART_COUNT="1")
        assert slurm.calls("python3") == [[*of_run, "begin"], [*of_run, "end", "85"]]
        assert done.stdout == "cpm: attempt 2 begins\n"

    def test_no_attempt_begins_that_the_agent_refuses(self, slurm: StandIns, one_node: str, run_dir: Path) -> None:
        slurm.answers(begin_exit_code="1")
        assert slurm.run(one_node, SLURM_RESTART_COUNT="1").returncode == 1
        assert slurm.calls("srun") == []
        assert not (run_dir / "attempt-1").exists()

    def test_the_code_of_the_node_that_failed_first_counts(self, slurm: StandIns, one_node: str) -> None:
        """srun knows only the highest, such as 143 of the nodes that it ended for the first."""
        slurm.answers(exit_code="143", end_exit_code="3")
        assert slurm.run(one_node).returncode == 3

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
    def test_a_signal_to_the_script_does_not_hide_how_srun_ends(
        self, number: signal.Signals, slurm: StandIns, one_node: str
    ) -> None:
        slurm.answers(exit_code="9", duration="0.4")
        process = slurm.start(one_node)
        _started(slurm)
        process.send_signal(number)
        time.sleep(0.1)
        process.send_signal(number)
        assert process.wait(timeout=30) == 9
        process.communicate()

    def test_a_signal_in_the_moment_in_which_srun_ends_neither(self, slurm: StandIns, one_node: str) -> None:
        """bash runs the trap first; meanwhile the step is gone, and only a last wait still knows its code."""
        slow_trap = one_node.replace("trap : TERM USR2", "trap 'sleep 0.6' TERM USR2")
        slurm.answers(exit_code="9", duration="0.3")
        process = slurm.start(slow_trap)
        _started(slurm)
        process.terminate()
        assert process.wait(timeout=30) == 9
        process.communicate()


class TestByHand:
    def test_each_line_is_bash(self, tmp_path: Path) -> None:
        for runtime in ("docker-rootless", "docker", "podman", "pyxis", "conda", "bare"):
            image = [] if runtime not in ("conda", "bare") else ["image=null"]
            plan = written(tmp_path, MINIMAL, f"runtime={runtime}", *image).plan
            for line in by_hand(plan):
                subprocess.run(["bash", "-n", "-c", line], check=True)
