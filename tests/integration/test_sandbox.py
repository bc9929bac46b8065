"""The sandbox with its real daemons: what Slurm does there, what `up` repairs, what `down` leaves.

Needs root and Debian's packages. A sandbox that is up already is used, and stays; otherwise one is brought up.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cpm_cluster.sandbox import cgroups, folders, network, sandbox
from cpm_cluster.sandbox.commands import SYSTEM_PATH
from cpm_cluster.sandbox.daemons import all_daemons
from cpm_cluster.sandbox.mounts import below
from cpm_cluster.sandbox.state import Node, Sandbox, SandboxError

STATE = Sandbox()
WAS_UP = network.is_up(STATE)
# Most of it takes a second or two on idle cores; these may have ten times as much to do.
PATIENCE_S = 180.0
# Holds a job until a file is there.
UNTIL_GO = "while [ ! -e {} ]; do sleep 0.2; done"


def as_user(state: Sandbox, *argv: str) -> list[str]:
    """Argv that runs a command as the ordinary user, in the shared folder, with a login's environment."""
    user = ["setpriv", f"--reuid={state.user}", f"--regid={state.gid}", "--init-groups"]
    variables = [f"PATH={SYSTEM_PATH}", f"HOME={state.home}", f"SLURM_CONF={state.slurm_conf}"]
    return [*user, "env", "--ignore-environment", f"--chdir={state.shared}", *variables, *argv]


def slurm(state: Sandbox, *argv: str) -> str:
    done = subprocess.run(as_user(state, *argv), capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    return done.stdout


def slurm_of_admin(state: Sandbox, *argv: str) -> None:
    subprocess.run(argv, env={**os.environ, "SLURM_CONF": str(state.slurm_conf)}, check=True)


def submit(state: Sandbox, script: str, *options: str) -> str:
    return slurm(state, "sbatch", "--parsable", "--output=%j.log", *options, f"--wrap={script}").strip()


def log_of(state: Sandbox, job: str) -> str:
    path = state.shared / f"{job}.log"
    return path.read_text() if path.exists() else ""


def job_facts(state: Sandbox, job: str) -> dict[str, str]:
    """`scontrol show job` as a mapping."""
    return dict(word.partition("=")[::2] for word in slurm(state, "scontrol", "show", "job", job).split())


def node_states(state: Sandbox) -> dict[str, str]:
    return dict(line.split() for line in slurm(state, "sinfo", "-h", "-N", "-p", "gpu1", "-o", "%N %T").splitlines())


def all_become_idle(state: Sandbox) -> bool:
    """Whether all nodes are idle, perhaps after a question of slurmctld's that was on its way when a link was cut."""
    return bool(eventually(lambda: node_states(state) == dict.fromkeys(state.node_names, "idle")))


def become_running(state: Sandbox, *jobs: str) -> bool:
    return bool(eventually(lambda: {job_facts(state, job)["JobState"] for job in jobs} == {"RUNNING"}))


def eventually(condition: Callable[[], Any], patience_s: float = PATIENCE_S) -> Any:
    """The first true answer; the last one when time is up."""
    deadline = time.monotonic() + patience_s
    while not (answer := condition()) and time.monotonic() < deadline:
        time.sleep(0.3)
    return answer


def daemon_pids(state: Sandbox) -> dict[str, int | None]:
    return {daemon.name: daemon.file.pid for daemon in all_daemons(state)}


def remains() -> dict[str, Any]:
    """What there is of a sandbox on this machine; empty if there is nothing."""
    interfaces = {path.name for path in Path("/sys/class/net").iterdir()}
    programs = {"munged", "mariadbd", "slurmdbd", "slurmctld", "slurmd", "slurmstepd", "slurmscriptd", "sleep 4243"}
    listed = subprocess.run(["ps", "-eo", "stat=,comm=,args="], capture_output=True, text=True, check=True).stdout
    commands = [line.split(maxsplit=2) for line in listed.splitlines()]
    found = {
        "folder": STATE.root.exists(),
        "mounts": below(STATE.root),
        "interfaces": interfaces & {STATE.bridge, *(host.link for host in STATE.hosts)},
        "firewall": STATE.bridge in subprocess.run(["iptables", "-S"], capture_output=True, text=True).stdout,
        "names": "cpm sandbox" in network.HOSTS.read_text(),
        "control groups": [p for name in STATE.node_names for p in cgroups.MOUNT.glob(f"*/slurm_{name}")],
        "processes": [words for words in commands if words[0][0] != "Z" and programs & set(words[1:])],
    }
    return {name: value for name, value in found.items() if value}


@pytest.mark.without_sandbox
@pytest.mark.skipif(WAS_UP, reason="a sandbox is up, and down would remove it: cpm sandbox down first")
def test_down_leaves_nothing(machine: None) -> None:
    assert remains() == {}, "nothing of it is there before"
    hosts = network.HOSTS.read_bytes(), network.HOSTS.stat().st_mode
    sandbox.up(STATE, install=False, with_containers=False)
    job = submit(STATE, "setsid sleep 4243 & sleep 4243", "-N2", "--gres=gpu:8")
    assert become_running(STATE, job)
    sandbox.down(STATE, keep_files=False, purge=False)
    assert remains() == {}
    assert (network.HOSTS.read_bytes(), network.HOSTS.stat().st_mode) == hosts


@pytest.mark.without_sandbox
@pytest.mark.skipif(WAS_UP, reason="a sandbox is up, and down would stop it: cpm sandbox down first")
def test_down_can_keep_runs_and_accounting(machine: None) -> None:
    sandbox.up(STATE, install=False, with_containers=False)
    job = submit(STATE, "echo kept")
    assert eventually(lambda: log_of(STATE, job) == "kept\n")
    assert eventually(lambda: slurm(STATE, "sacct", "-n", "-X", "-j", job, "-s", "CD"))
    sandbox.down(STATE, keep_files=True, purge=False)
    assert set(remains()) == {"folder"}
    sandbox.up(STATE, install=False, with_containers=False)
    assert log_of(STATE, job) == "kept\n"
    assert slurm(STATE, "sacct", "-n", "-X", "-j", job, "-s", "CD")
    sandbox.down(STATE, keep_files=False, purge=False)
    assert remains() == {}


def test_all_eight_nodes_are_idle(cluster: Sandbox) -> None:
    assert all_become_idle(cluster), node_states(cluster)


def test_a_task_for_each_gpu_of_the_cluster_runs_on_its_own_host(cluster: Sandbox) -> None:
    names = slurm(cluster, "srun", "-N8", "--ntasks-per-node=8", "hostname").split()
    assert {name: names.count(name) for name in names} == dict.fromkeys(cluster.node_names, 8)


def test_nodes_reach_each_other_by_name_over_their_own_interface(cluster: Sandbox) -> None:
    script = "import socket; s = socket.create_connection(('g2008', 16818), 60); print(s.getsockname()[0])"
    assert slurm(cluster, "srun", "-w", "g2002", "python3", "-c", script).strip() == "10.77.0.2"


def test_a_step_sees_the_gpus_that_it_was_given(cluster: Sandbox) -> None:
    lines = slurm(cluster, "srun", "--gres=gpu:3", "nvidia-smi", "-L").splitlines()
    assert len(lines) == 3
    assert len({re.search(r"UUID: (GPU-[0-9a-f-]{36})\)", line)[1] for line in lines}) == 3  # type: ignore[index]


def test_jobs_on_one_node_have_different_gpus_and_cannot_open_each_others(cluster: Sandbox) -> None:
    go = cluster.shared / f"go-{time.time_ns()}"
    script = f"nvidia-smi --query-gpu=uuid --format=csv,noheader; python3 opens.py; {UNTIL_GO.format(go)}"
    (cluster.shared / "opens.py").write_text(
        "import errno, os, socket\n"
        "for index in range(8):\n"
        "    try:\n"
        f"        os.open(f'{cluster.root}/nodes/{{socket.gethostname()}}/dev/nvidia{{index}}', os.O_RDWR)\n"
        "    except OSError as error:\n"
        "        print(errno.errorcode[error.errno])\n"
    )
    options = ["-w", "g2003", "--gres=gpu:4", "--cpus-per-task=8"]
    jobs = [submit(cluster, f"srun --cpus-per-task=8 bash -c '{script}'", *options) for _ in range(2)]
    assert eventually(lambda: all(len(log_of(cluster, job).split()) == 12 for job in jobs))
    logs = [log_of(cluster, job) for job in jobs]
    assert {job_facts(cluster, job)["JobState"] for job in jobs} == {"RUNNING"}
    go.touch()
    words = [log.split() for log in logs]
    assert [(w.count("ENXIO"), w.count("EPERM")) for w in words] == [(4, 4), (4, 4)]  # no device behind it; not allowed
    assert len({word for w in words for word in w if word.startswith("GPU-")}) == 8


def test_accounting_knows_the_gpus_of_a_job(cluster: Sandbox) -> None:
    job = submit(cluster, "true", "--gres=gpu:5")
    row = eventually(
        lambda: slurm(cluster, "sacct", "-X", "-n", "-P", "-j", job, "-s", "CD", "-o", "State,AllocTRES,User")
    )
    state, resources, user = row.strip().split("|")
    assert (state, user) == ("COMPLETED", cluster.user)
    assert "gres/gpu=5" in resources.split(",")


@pytest.mark.skipif(not cgroups.confinement().memory, reason="no memory controller here")
def test_a_job_that_exceeds_its_memory_is_killed(cluster: Sandbox) -> None:
    argv = as_user(cluster, "srun", "--mem=100M", "python3", "-c", "bytearray(300 << 20)")
    done = subprocess.run(argv, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode != 0
    assert "Out Of Memory" in done.stderr


@pytest.mark.skipif(bool(cgroups.confinement().caveat), reason=cgroups.confinement().caveat)
def test_a_process_that_hides_from_its_parents_ends_with_its_job(cluster: Sandbox) -> None:
    hidden = "setsid sh -c 'sleep 4242 & echo pid $!' </dev/null & sleep 4242"
    job = submit(cluster, hidden, "-w", "g2004")
    pid = eventually(lambda: re.search(r"pid (\d+)\n", log_of(cluster, job)))[1]
    assert Path("/proc", pid).exists()
    slurm(cluster, "scancel", job)
    assert eventually(lambda: not Path("/proc", pid).exists())


def test_a_job_in_the_other_partition_is_preempted_and_requeued(cluster: Sandbox) -> None:
    # appended to, since it may start again before its log is looked at
    where = ("-w", "g2005", "--gres=gpu:8")
    low = submit(cluster, "sleep 3000", "-p", "preempt", "--open-mode=append", *where)
    assert become_running(cluster, low)
    with grace_time(cluster, 10):
        high = submit(cluster, "sleep 1", "-p", "gpu1", *where)
        assert eventually(lambda: job_facts(cluster, high)["JobState"] == "COMPLETED")
    assert job_facts(cluster, low)["Restarts"] == "1"
    assert "DUE TO PREEMPTION" in log_of(cluster, low)
    assert become_running(cluster, low), "starts again"
    slurm(cluster, "scancel", low)


@contextmanager
def grace_time(state: Sandbox, seconds: int) -> Iterator[None]:
    """The time that a job has which is to be preempted and does not end by itself."""
    told = slurm(state, "scontrol", "show", "partition", "preempt")
    before = re.search(r"GraceTime=(\d+)", told)
    assert before is not None, told
    partition = ("scontrol", "update", "partitionname=preempt")
    slurm_of_admin(state, *partition, f"gracetime={seconds}")
    try:
        yield
    finally:
        slurm_of_admin(state, *partition, f"gracetime={before[1]}")


@contextmanager
def cut(node: Node) -> Iterator[None]:
    subprocess.run(["ip", "link", "set", node.link, "down"], check=True)
    try:
        yield
    finally:
        subprocess.run(["ip", "link", "set", node.link, "up"], check=True)


def test_a_link_that_is_cut_for_a_while_costs_nothing(cluster: Sandbox) -> None:
    node = cluster.nodes[5]
    with cut(node):
        assert eventually(lambda: node_states(cluster)[node.name] == "idle*"), "Slurm misses it"
        assert [n.name for n in sandbox.status(cluster).nodes if not n.link_up] == [node.name]
    assert eventually(lambda: node_states(cluster)[node.name] == "idle")


def test_a_node_whose_link_stays_cut_is_down_and_up_brings_it_back(cluster: Sandbox) -> None:
    node = cluster.nodes[1]
    with cut(node):
        assert eventually(lambda: node_states(cluster)[node.name] == "down*", 2 * PATIENCE_S)
    sandbox.up(cluster, install=False, with_containers=False)
    assert node_states(cluster)[node.name] == "idle"


def test_jobs_outlive_the_controller(cluster: Sandbox) -> None:
    assert all_become_idle(cluster), node_states(cluster)
    go = cluster.shared / f"go-{time.time_ns()}"
    job = submit(cluster, f"{UNTIL_GO.format(go)}; echo survived")
    assert become_running(cluster, job)
    # a change of the job, after which slurmctld saves its jobs once more: it may have done so before this one ran
    changed, saved = time.time(), cluster.root / "slurmctld" / "job_state"
    slurm(cluster, "scontrol", "update", f"jobid={job}", "comment=runs")
    assert eventually(lambda: saved.stat().st_mtime > changed), "slurmctld has not saved that it runs"
    kill(cluster, "slurmctld")
    assert eventually(lambda: daemon_pids(cluster)["slurmctld"] is None)
    sandbox.up(cluster, install=False, with_containers=False)
    go.touch()
    assert eventually(lambda: job_facts(cluster, job)["JobState"] == "COMPLETED"), job_facts(cluster, job)
    assert log_of(cluster, job) == "survived\n"
    assert job_facts(cluster, job)["Restarts"] == "0"


def kill(state: Sandbox, daemon: str) -> None:
    pid = daemon_pids(state)[daemon]
    assert pid is not None, f"{daemon} is not up"
    os.kill(pid, signal.SIGKILL)


def test_a_second_up_changes_nothing(cluster: Sandbox) -> None:
    before, hosts = daemon_pids(cluster), network.HOSTS.read_bytes()
    sandbox.up(cluster, install=False, with_containers=False)
    assert daemon_pids(cluster) == before
    assert network.HOSTS.read_bytes() == hosts


def test_up_mends_what_was_killed_cut_and_drained(cluster: Sandbox) -> None:
    subprocess.run(["ip", "link", "delete", cluster.nodes[3].link], check=True)
    subprocess.run(["ip", "link", "set", cluster.nodes[4].link, "down"], check=True)
    slurm_of_admin(cluster, "scontrol", "update", "nodename=g2006", "state=drain", "reason=test")
    for name in ("munged", "mariadbd", "slurmdbd", "slurmd-g2003"):
        kill(cluster, name)
    sandbox.up(cluster, install=False, with_containers=False)
    assert all_become_idle(cluster), node_states(cluster)
    names = slurm(cluster, "srun", "-N8", "hostname").split()
    assert sorted(names) == list(cluster.node_names)


def test_status_is_the_same_for_people_and_programs(cluster: Sandbox) -> None:
    assert all_become_idle(cluster), node_states(cluster)
    argv = [str(Path(sys.executable).parent / "cpm"), "sandbox", "status", "--json"]
    found = json.loads(subprocess.run(argv, capture_output=True, check=True, text=True).stdout)
    assert found["up"] is True
    assert {node["name"]: node["state"] for node in found["nodes"]} == node_states(cluster)
    assert [partition["name"] for partition in found["partitions"]] == ["gpu1", "preempt"]


def test_a_second_sandbox_is_refused_and_its_down_does_not_touch_the_first(cluster: Sandbox, tmp_path: Path) -> None:
    pids = daemon_pids(cluster)
    other = Sandbox(root=tmp_path)
    with pytest.raises(SandboxError, match=f"cpmbr0 belongs to the sandbox in {cluster.root}: take that down first"):
        sandbox.up(other, install=False, with_containers=False)
    folders.claim(other)
    with subprocess.Popen(as_user(cluster, "sleep", "600")) as of_the_user:
        sandbox.down(other, keep_files=False, purge=False)
        assert of_the_user.poll() is None
        of_the_user.kill()
    assert not tmp_path.exists()
    assert daemon_pids(cluster) == pids
    assert all_become_idle(cluster), node_states(cluster)
