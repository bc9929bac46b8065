"""The step's memory group in both versions of cgroups, from folders that look like the kernel's."""

from __future__ import annotations

import pytest

from cpm_cluster.agent import memory_cgroup
from cpm_cluster.agent.memory_cgroup import MemoryCgroup

GIB = 1 << 30
NO_LIMIT_V1 = 9223372036854771712
JOB = "slurm/uid_1/job_7"
V1 = ("memory.usage_in_bytes", "memory.limit_in_bytes", "memory.oom_control", "oom_kill_disable 0\nunder_oom 0\n")
V2 = ("memory.current", "memory.max", "memory.events", "low 0\nhigh 0\nmax 9\noom 3\n")


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """Groups and the processes in them: `group(path, …)` makes or changes one, `process(pid, path)` puts one there."""
    monkeypatch.setattr(memory_cgroup, "PROC", tmp_path / "proc")
    monkeypatch.setattr(memory_cgroup, "MOUNT", tmp_path / "cgroup")

    class Kernel:
        version = 1

        def group(self, path, current=0, limit=None, kills=0):
            mount = tmp_path / "cgroup" / ("memory" if self.version == 1 else "")
            names = V1 if self.version == 1 else V2
            folder = mount / path
            folder.mkdir(parents=True, exist_ok=True)
            (folder / names[0]).write_text(f"{current}\n")
            none = NO_LIMIT_V1 if self.version == 1 else "max"
            (folder / names[1]).write_text(f"{none if limit is None else limit}\n")
            (folder / names[2]).write_text(f"{names[3]}oom_kill {kills}\n")
            return folder

        def process(self, pid, path):
            (tmp_path / "proc" / pid).mkdir(parents=True, exist_ok=True)
            lines = (
                f"5:devices:/x\n4:memory:/{path}\n0::/\n" if self.version == 1 else f"1:name=systemd:/\n0::/{path}\n"
            )
            (tmp_path / "proc" / pid / "cgroup").write_text(lines)

    return Kernel()


@pytest.mark.parametrize("version", [1, 2])
def test_a_task_of_slurm_is_measured_by_its_step_and_the_least_limit_above(kernel, version):
    kernel.version = version
    kernel.group(JOB, limit=8 * GIB)
    kernel.group(f"{JOB}/step_0", current=5 * GIB, limit=16 * GIB)
    kernel.group(f"{JOB}/step_0/task_0", current=GIB)
    kernel.process("10", f"{JOB}/step_0/task_0")
    expected = {"current_bytes": 5 * GIB, "max_bytes": 8 * GIB, "oom_kills": 0}
    assert MemoryCgroup("10").measure() == expected


@pytest.mark.parametrize("version", [1, 2])
def test_without_any_limit(kernel, version):
    kernel.version = version
    kernel.group("user", current=7)
    kernel.process("10", "user")
    assert MemoryCgroup("10").measure() == {"current_bytes": 7, "max_bytes": None, "oom_kills": 0}


def test_in_version_1_a_kill_is_counted_where_the_process_was_although_its_group_has_gone(kernel):
    kernel.group(f"{JOB}/step_0", current=2)
    kernel.group(f"{JOB}/step_0/task_0")
    inner = f"{JOB}/step_0/task_0/container"
    folder = kernel.group(inner)
    kernel.process("10", f"{JOB}/step_0/task_0")
    kernel.process("11", inner)
    memory = MemoryCgroup("10")
    assert memory.look(11) == 0
    kernel.group(inner, kills=1)
    assert memory.look(11) == 1
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    assert memory.measure() == {"current_bytes": 2, "max_bytes": None, "oom_kills": 1}


def test_in_version_2_a_group_counts_those_below_it_already(kernel):
    kernel.version = 2
    kernel.group(f"{JOB}/step_0", kills=0)
    kernel.group(f"{JOB}/step_0/user/task_0")
    kernel.process("10", f"{JOB}/step_0/user/task_0")
    kernel.process("11", f"{JOB}/step_0/user/task_0")
    memory = MemoryCgroup("10")
    kernel.group(f"{JOB}/step_0", kills=2)
    kernel.group(f"{JOB}/step_0/user/task_0", kills=2)
    assert memory.look(11) == 2


def test_what_was_killed_before_the_run_is_not_its_own(kernel):
    kernel.group("session", kills=4)
    kernel.process("10", "session")
    memory = MemoryCgroup("10")
    kernel.group("session", kills=5)
    assert memory.look() == 1


@pytest.mark.parametrize("version", [1, 2])
def test_a_daemons_container_has_its_group_elsewhere(kernel, version):
    kernel.version = version
    kernel.group(f"{JOB}/step_0", current=1)
    kernel.group("docker/abc", current=3 * GIB, limit=4 * GIB, kills=1)
    kernel.process("10", f"{JOB}/step_0")
    kernel.process("11", "docker/abc")
    memory = MemoryCgroup("10")
    assert memory.measure(11) == {"current_bytes": 3 * GIB, "max_bytes": 4 * GIB, "oom_kills": 1}


def test_a_machine_that_shows_no_groups(kernel):
    assert MemoryCgroup("10").measure(11) is None
    kernel.process("10", "hidden")
    assert MemoryCgroup("10").measure() == {"current_bytes": None, "max_bytes": None, "oom_kills": 0}
