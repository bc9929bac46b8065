"""`cpm shell` as people use it, on a pseudo-terminal: here, and inside an image on the sandbox.

The sandbox needs root and Debian's packages. One that is up already is used, and stays; otherwise one is brought up.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster_runs import ClusterRun, ClusterRuns
from local_runs import Terminal, all_processes, command_line, environment_of, parent_of, wait_for

from cpm_cluster.sandbox.state import Sandbox

STATE = Sandbox()
# Each runtime on a node of its own: docker only where the node has a daemon.
NODES = {"docker-rootless": "g2005", "podman": "g2006", "docker": "g2002"}


@pytest.fixture(scope="module")
def user(cluster: Sandbox) -> Iterator[ClusterRuns]:
    root = Path(tempfile.mkdtemp(prefix="shells-", dir=STATE.shared))
    root.chmod(0o755)
    yield ClusterRuns(STATE, root)
    shutil.rmtree(root)


class Shell(ClusterRun):
    """A shell on the sandbox, seen from its terminal, and as root sees what it leaves."""

    def __init__(self, user: ClusterRuns, runtime: str, cluster: str) -> None:
        name = f"t{os.getpid()}-{len(os.listdir(user.root))}"
        words = ("lora-10b-2x80g", "--cluster", cluster, "--time", "20m", "--set", f"name={name}")
        words += ("--set", f"runtime={runtime}", "--set", f"slurm.nodelist={NODES[runtime]}")
        (user.root / name).mkdir()
        self.screen = Terminal(user, "cpm", "shell", *words, "--set", "resources.cpus_per_node=2")
        self.name = f"{name}-shell"
        (folder,) = wait_for("folder of the shell", lambda: list(user.jobs.glob(f".{self.name}-*")))
        super().__init__(user, folder)
        self.id = folder.name[1:]
        self.node = NODES[runtime]
        self.daemon_was_killed = False
        self._job_ids: list[str] = []

    @property
    def job_ids(self) -> list[str]:
        argv = ["squeue", "--noheader", f"--name={self.id}", "--states=all", "--format=%A"]
        self._job_ids = self.runs.slurm(*argv).split() or self._job_ids
        return self._job_ids

    @property
    def plan(self) -> dict[str, Any]:
        return {"data_root": None}

    def await_prompt(self) -> None:
        """Wait for the line that says where one is, and for bash."""
        self.screen.await_text("ends it", "$ " if self.node == NODES["docker"] else "# ")

    def says(self, command: str) -> str:
        """What a command prints."""
        self.screen.type(f"echo be''gin; {command}; echo e''nd")
        found = wait_for(command, lambda: re.search(r"begin\r\n(.*?)end\r\n", self.screen.text, re.DOTALL))
        self.screen.raw = ""
        return found[1].replace("\r\n", "\n").strip()

    @property
    def srun(self) -> int:
        """srun's outer process, on the machine where the user types."""
        return next(pid for pid in all_processes() if parent_of(pid) == self.screen.pid)

    @property
    def guard_and_agent(self) -> list[int]:
        """The two processes of ours on the node."""
        mark = f"SLURM_JOB_ID={self.job_id}"
        found = [p for p in all_processes() if str(self.folder) in command_line(p) and mark in environment_of(p)]
        return sorted((p for p in found if "srun" not in command_line(p)), key=lambda p: parent_of(p) in found)

    def _containers(self) -> Iterator[str]:
        """Of a rootless daemon that was killed, its container is removed by the next one (docker run --rm)."""
        return (found for found in super()._containers() if not self.daemon_was_killed or " in " not in found)

    def left(self, queued: bool = False) -> list[str]:
        folders = [*Path(tempfile.gettempdir()).glob(f"{self.id}*"), *self.runs.jobs.glob(".*-shell-*")]
        return [*super().left(queued), *(f"folder {path}" for path in folders)]


@pytest.fixture
def shell(user: ClusterRuns) -> Iterator[Callable[[str], Shell]]:
    opened = []

    def open_(runtime: str, cluster: str = "sandbox") -> Shell:
        opened.append(Shell(user, runtime, cluster))
        return opened[-1]

    yield open_
    for each in opened:
        each.screen.kill()
        subprocess.run(["scancel", "--quiet", *each.job_ids], env={**os.environ, "SLURM_CONF": str(STATE.slurm_conf)})


@pytest.mark.parametrize("runtime", NODES)
def test_a_shell_inside_the_image_with_the_gpus_and_files_of_whoever_types(user, shell, runtime):
    session = shell(runtime)
    session.await_prompt()
    told = rf"{session.node}, 2 GPUs, cpmlive-flash:0\.0\.4 \({runtime}\), until \d\d:\d\d \((1\d|20) min left\)"
    assert re.search(told, session.screen.text)
    session.screen.raw = ""
    gpus = session.says("nvidia-smi -L").splitlines()
    assert len(gpus) == 2 and all("UUID: GPU-" in line for line in gpus)
    assert session.says("df --output=size --block-size=1G /dev/shm | tail -n 1") == "4"
    assert session.says("pwd") == str(user.jobs)
    assert session.says("python3 -c 'import torch; print(torch.__version__)'").endswith("+cpu")
    assert session.says("echo $NCCL_DEBUG; touch made; ls") == "WARN\nmade"
    session.screen.type("exit 7")
    assert session.screen.await_exit() == 7
    session.await_nothing_left()
    assert (user.jobs / "made").stat().st_uid == STATE.uid
    (user.jobs / "made").unlink()


def kill_srun(session: Shell) -> None:
    os.kill(session.srun, signal.SIGKILL)


def kill_agent(session: Shell) -> None:
    os.kill(session.guard_and_agent[1], signal.SIGKILL)


def kill_guard(session: Shell) -> None:
    os.kill(session.guard_and_agent[0], signal.SIGKILL)


def close_window(session: Shell) -> None:
    session.screen.close()


def cancel_job(session: Shell) -> None:
    session.runs.slurm("scancel", session.job_id)


def terminate(session: Shell) -> None:
    os.kill(session.screen.pid, signal.SIGTERM)


def kill_cpm(session: Shell) -> None:
    os.kill(session.screen.pid, signal.SIGKILL)


@pytest.mark.parametrize("runtime", ["docker-rootless", "podman"])
@pytest.mark.parametrize("end", [kill_srun, kill_agent, kill_guard, close_window, cancel_job, terminate, kill_cpm])
def test_whatever_ends_it_nothing_is_left(shell, runtime, end):
    session = shell(runtime)
    session.await_prompt()
    session.screen.raw = ""
    session.screen.type("nohup sleep 4711 & trap '' HUP TERM; echo be''gun")
    session.screen.await_text("begun")
    assert session.job_ids and len(session.guard_and_agent) == 2
    end(session)
    session.daemon_was_killed = end in (kill_srun, kill_agent, kill_guard, kill_cpm)
    assert session.screen.await_exit() != 0
    session.await_nothing_left(60)


def test_the_next_shell_removes_the_container_of_a_daemon_that_was_killed(shell):
    killed = shell("docker-rootless")
    killed.await_prompt()
    kill_srun(killed)
    killed.screen.await_exit()
    following = shell("docker-rootless")
    following.await_prompt()
    following.screen.type("exit 0")
    assert following.screen.await_exit() == 0
    for each in (killed, following):
        each.await_nothing_left()


def test_ctrl_c_while_the_image_is_awaited_ends_it(user, shell):
    """It is loaded, and not there as after the other tests."""
    fresh = {"runtimes__docker-rootless__data_root": str(user.folder("fresh"))}
    session = shell("docker-rootless", user.cluster("fresh", **fresh))
    session.screen.await_text("is loaded unless it is there")
    session.screen.press_ctrl_c()
    assert session.screen.await_exit() == 130
    session.await_nothing_left(60)


def test_a_shell_here_has_the_environment_of_a_job(runs, terminal):
    screen = terminal("cpm", "shell", "cpu-2", "--cluster", "local", "--set", "env={A: 'x y'}")
    screen.await_text("no GPUs, bare; exit or Ctrl-D ends it")
    screen.type('echo "<$A>" $PWD; exit 7')
    assert screen.await_exit() == 7
    assert f"<x y> {runs.jobs}" in screen.text
    assert [path.name for path in runs.jobs.iterdir()] == ["rows.jsonl"]


def test_ctrl_c_is_for_what_runs_in_the_shell(runs, terminal):
    screen = terminal("cpm", "shell", "cpu-2", "--cluster", "local")
    screen.await_text("ends it")
    length = f"600.{os.getpid()}"
    screen.type(f"sleep {length}")
    wait_for("sleep", lambda: any(command_line(pid) == f"sleep {length}" for pid in all_processes()))
    screen.press_ctrl_c()
    screen.type("echo co''de $?; exit 0")
    screen.await_text("code 130")
    assert screen.await_exit() == 0


def test_a_closed_window_ends_a_shell_here(runs, terminal):
    screen = terminal("cpm", "shell", "cpu-2", "--cluster", "local")
    screen.await_text("ends it")
    screen.close()
    assert screen.await_exit() in (0, 128 + signal.SIGHUP)  # bash sees the end of its input, or the signal, first
    assert [path.name for path in runs.jobs.iterdir()] == ["rows.jsonl"]


def test_without_a_terminal_there_is_no_shell(runs):
    done = runs.cpm("shell", "cpu-2", "--cluster", "local")
    assert (done.returncode, done.stdout) == (2, "")
    assert "a shell needs a terminal" in done.stderr
    assert [path.name for path in runs.jobs.iterdir()] == ["rows.jsonl"]
