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


def as_user(state: Sandbox, *argv: str) -> list[str]:
    """Argv that runs a command as the ordinary user, in the shared folder, with a login's environment."""
    user = ["setpriv", f"--reuid={state.user}", f"--regid={state.gid}", "--init-groups"]
    variables = [f"PATH={SYSTEM_PATH}", f"HOME={state.home}", f"SLURM_CONF={state.slurm_conf}"]
    return [*user, "env", "--ignore-environment", f"--chdir={state.shared}", *variables, *argv]


def slurm(state: Sandbox, *argv: str) -> str:
    done = subprocess.run(as_user(state, *argv), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


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


def eventually(condition: Callable[[], Any], patience_s: float) -> Any:
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
    programs = {"munged", "mariadbd", "slurmdbd", "slurmctld", "slurmd", "slurmstepd", "sleep 4243"}
    commands = subprocess.run(["ps", "-eo", "stat=,args="], capture_output=True, text=True, check=True).stdout
    found = {
        "folder": STATE.root.exists(),
        "mounts": below(STATE.root),
        "interfaces": interfaces & {STATE.bridge, *(host.link for host in STATE.hosts)},
        "firewall": STATE.bridge in subprocess.run(["iptables", "-S"], capture_output=True, text=True).stdout,
        "names": "cpm sandbox" in network.HOSTS.read_text(),
        "control groups": [p for name in STATE.node_names for p in cgroups.MOUNT.glob(f"*/slurm_{name}")],
        "processes": [line for line in commands.splitlines() if line[0] != "Z" and any(p in line for p in programs)],
    }
    return {name: value for name, value in found.items() if value}


@pytest.mark.without_sandbox
@pytest.mark.skipif(WAS_UP, reason="a sandbox is up, and down would remove it: cpm sandbox down first")
def test_down_leaves_nothing(machine: None) -> None:
    assert remains() == {}, "nothing of it is there before"
    hosts = network.HOSTS.read_bytes(), network.HOSTS.stat().st_mode
    sandbox.up(STATE, install=False, with_containers=False)
    job = submit(STATE, "setsid sleep 4243 & sleep 4243", "-N2", "--gres=gpu:8")
    assert eventually(lambda: job_facts(STATE, job)["JobState"] == "RUNNING", 20)
    sandbox.down(STATE, keep_files=False, purge=False)
    assert remains() == {}
    assert (network.HOSTS.read_bytes(), network.HOSTS.stat().st_mode) == hosts


@pytest.mark.without_sandbox
@pytest.mark.skipif(WAS_UP, reason="a sandbox is up, and down would stop it: cpm sandbox down first")
def test_down_can_keep_runs_and_accounting(machine: None) -> None:
    sandbox.up(STATE, install=False, with_containers=False)
    job = submit(STATE, "echo kept")
    assert eventually(lambda: log_of(STATE, job) == "kept\n", 20)
    assert eventually(lambda: slurm(STATE, "sacct", "-n", "-X", "-j", job, "-s", "CD"), 30)
    sandbox.down(STATE, keep_files=True, purge=False)
    assert set(remains()) == {"folder"}
    sandbox.up(STATE, install=False, with_containers=False)
    assert log_of(STATE, job) == "kept\n"
    assert slurm(STATE, "sacct", "-n", "-X", "-j", job, "-s", "CD")
    sandbox.down(STATE, keep_files=False, purge=False)
    assert remains() == {}


def test_all_eight_nodes_are_idle(cluster: Sandbox) -> None:
    assert node_states(cluster) == dict.fromkeys(cluster.node_names, "idle")


def test_a_task_for_each_gpu_of_the_cluster_runs_on_its_own_host(cluster: Sandbox) -> None:
    names = slurm(cluster, "srun", "-N8", "--ntasks-per-node=8", "hostname").split()
    assert {name: names.count(name) for name in names} == dict.fromkeys(cluster.node_names, 8)


def test_nodes_reach_each_other_by_name_over_their_own_interface(cluster: Sandbox) -> None:
    script = "import socket; s = socket.create_connection(('g2008', 16818), 5); print(s.getsockname()[0])"
    assert slurm(cluster, "srun", "-w", "g2002", "python3", "-c", script).strip() == "10.77.0.2"


def test_a_step_sees_the_gpus_that_it_was_given(cluster: Sandbox) -> None:
    lines = slurm(cluster, "srun", "--gres=gpu:3", "nvidia-smi", "-L").splitlines()
    assert len(lines) == 3
    assert len({re.search(r"UUID: (GPU-[0-9a-f-]{36})\)", line)[1] for line in lines}) == 3  # type: ignore[index]


def test_jobs_on_one_node_have_different_gpus_and_cannot_open_each_others(cluster: Sandbox) -> None:
    script = "nvidia-smi --query-gpu=uuid --format=csv,noheader; python3 opens.py; sleep 5"
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
    logs = [
        eventually(lambda job=job: len(log_of(cluster, job).split()) == 12 and log_of(cluster, job), 30) for job in jobs
    ]
    assert {job_facts(cluster, job)["JobState"] for job in jobs} == {"RUNNING"}
    words = [log.split() for log in logs]
    assert [(w.count("ENXIO"), w.count("EPERM")) for w in words] == [(4, 4), (4, 4)]  # no device behind it; not allowed
    assert len({word for w in words for word in w if word.startswith("GPU-")}) == 8


def test_accounting_knows_the_gpus_of_a_job(cluster: Sandbox) -> None:
    job = submit(cluster, "true", "--gres=gpu:5")
    row = eventually(
        lambda: slurm(cluster, "sacct", "-X", "-n", "-P", "-j", job, "-s", "CD", "-o", "State,AllocTRES,User"), 30
    )
    state, resources, user = row.strip().split("|")
    assert (state, user) == ("COMPLETED", cluster.user)
    assert "gres/gpu=5" in resources.split(",")


@pytest.mark.skipif(not cgroups.confinement().memory, reason="no memory controller here")
def test_a_job_that_exceeds_its_memory_is_killed(cluster: Sandbox) -> None:
    argv = as_user(cluster, "srun", "--mem=100M", "python3", "-c", "bytearray(300 << 20)")
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "Out Of Memory" in done.stderr


@pytest.mark.skipif(bool(cgroups.confinement().caveat), reason=cgroups.confinement().caveat)
def test_a_process_that_hides_from_its_parents_ends_with_its_job(cluster: Sandbox) -> None:
    hidden = "setsid sh -c 'sleep 4242 & echo pid $!' </dev/null & sleep 4242"
    job = submit(cluster, hidden, "-w", "g2004")
    pid = eventually(lambda: re.search(r"pid (\d+)", log_of(cluster, job)), 20)[1]
    assert Path("/proc", pid).exists()
    slurm(cluster, "scancel", job)
    assert eventually(lambda: not Path("/proc", pid).exists(), 40)


def test_a_job_in_the_other_partition_is_preempted_and_requeued(cluster: Sandbox) -> None:
    low = submit(cluster, "sleep 300", "-p", "preempt", "-w", "g2005", "--gres=gpu:8")
    assert eventually(lambda: job_facts(cluster, low)["JobState"] == "RUNNING", 20)
    high = submit(cluster, "sleep 1", "-p", "gpu1", "-w", "g2005", "--gres=gpu:8")
    assert eventually(lambda: job_facts(cluster, high)["JobState"] == "COMPLETED", 90)
    assert job_facts(cluster, low)["Restarts"] == "1"
    assert "DUE TO PREEMPTION" in log_of(cluster, low)
    assert eventually(lambda: job_facts(cluster, low)["JobState"] == "RUNNING", 60), "starts again"
    slurm(cluster, "scancel", low)


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
        assert eventually(lambda: node_states(cluster)[node.name] == "idle*", 100), "Slurm misses it"
        assert [n.name for n in sandbox.status(cluster).nodes if not n.link_up] == [node.name]
    assert eventually(lambda: node_states(cluster)[node.name] == "idle", 60)


def test_a_node_whose_link_stays_cut_is_down_and_up_brings_it_back(cluster: Sandbox) -> None:
    node = cluster.nodes[1]
    with cut(node):
        assert eventually(lambda: node_states(cluster)[node.name] == "down*", 150)
    sandbox.up(cluster, install=False, with_containers=False)
    assert node_states(cluster)[node.name] == "idle"


def test_jobs_outlive_the_controller(cluster: Sandbox) -> None:
    assert eventually(lambda: set(node_states(cluster).values()) == {"idle"}, 90), node_states(cluster)
    job = submit(cluster, "sleep 8; echo survived")
    assert eventually(lambda: job_facts(cluster, job)["JobState"] == "RUNNING", 20)
    started, saved = time.time(), cluster.root / "slurmctld" / "job_state"
    assert eventually(lambda: saved.stat().st_mtime > started, 8), "slurmctld has not saved that it runs"
    pid = daemon_pids(cluster)["slurmctld"]
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    assert eventually(lambda: daemon_pids(cluster)["slurmctld"] is None, 10)
    sandbox.up(cluster, install=False, with_containers=False)
    assert eventually(lambda: job_facts(cluster, job)["JobState"] == "COMPLETED", 60), job_facts(cluster, job)
    assert log_of(cluster, job) == "survived\n"
    assert job_facts(cluster, job)["Restarts"] == "0"


def test_a_second_up_changes_nothing(cluster: Sandbox) -> None:
    before, hosts = daemon_pids(cluster), network.HOSTS.read_bytes()
    sandbox.up(cluster, install=False, with_containers=False)
    assert daemon_pids(cluster) == before
    assert network.HOSTS.read_bytes() == hosts


def test_up_mends_what_was_killed_cut_and_drained(cluster: Sandbox) -> None:
    subprocess.run(["ip", "link", "delete", cluster.nodes[3].link], check=True)
    subprocess.run(["ip", "link", "set", cluster.nodes[4].link, "down"], check=True)
    environment = {**os.environ, "SLURM_CONF": str(cluster.slurm_conf)}
    drain = ["scontrol", "update", "nodename=g2006", "state=drain", "reason=test"]
    subprocess.run(drain, env=environment, check=True)
    pids = daemon_pids(cluster)
    for name in ("munged", "mariadbd", "slurmdbd", "slurmd-g2003"):
        os.kill(pids[name] or 0, signal.SIGKILL)
    sandbox.up(cluster, install=False, with_containers=False)
    assert node_states(cluster) == dict.fromkeys(cluster.node_names, "idle")
    names = slurm(cluster, "srun", "-N8", "hostname").split()
    assert sorted(names) == list(cluster.node_names)


def test_status_is_the_same_for_people_and_programs(cluster: Sandbox) -> None:
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
    sandbox.down(other, keep_files=False, purge=False)
    assert not tmp_path.exists()
    assert daemon_pids(cluster) == pids
    assert node_states(cluster) == dict.fromkeys(cluster.node_names, "idle")
