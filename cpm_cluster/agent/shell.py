"""`python PACKAGE FOLDER`: an interactive shell on this node, inside the job's container; nothing is left behind.

The folder holds the plan and the package; what the node needs beyond that lies in a private folder of its own. The
exit code is the shell's; 3 where this node cannot run it; 128 + n where signal n ended it, as at the time limit.

`python PACKAGE FOLDER clean` is Slurm's task epilog: where srun dies, or gets a signal, it has all of the step killed
at once by SIGKILL, and nobody else is there to clean up. It has 5 s (man srun, --task-epilog).
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType

from cpm_cluster.agent import containers, preflight, process_tree
from cpm_cluster.agent.guard import PASSED_ON, guarded
from cpm_cluster.agent.rootless_docker import RootlessDocker
from cpm_cluster.agent.surroundings import NodeError, gpu_uuids, inherited_environment, node_facts
from cpm_cluster.launch.plan import LaunchPlan, NodeFacts
from cpm_cluster.launch.runtimes import shell_argv
from cpm_cluster.runs.layout import RunLayout
from cpm_cluster.runs.records import read_json, write_json

EXIT_NODE_ERROR = 3
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# A shell that is told to hang up writes its history; Slurm's KillWait is 30 s.
GRACE_AFTER_HANGUP_S = 5.0
GRACE_OF_STRAGGLERS_S = 5.0
POLL_S = 0.05
# Who types sees the time that is left, and may well come to make room on a full disk.
CHECKS_OF_RUNS = ("time", "disk")
PATIENCE_OF_EPILOG_S = 3.0
# One whose processes are still dying cannot be removed.
REMOVALS_TRIED = 5


class _AskedToEnd(Exception):
    """A signal came before there was a shell."""


class ShellAgent:
    """One shell, from the bare node to the bare node."""

    def __init__(self, folder: Path) -> None:
        self.started = int(time.time())
        self.folder = folder
        self.plan = LaunchPlan.from_json((folder / "launch.json").read_text(encoding="utf-8"))
        self.private = Path(tempfile.gettempdir()) / self.plan.run_id
        self.private.mkdir(mode=0o700, exist_ok=True)
        self.trace = self.private / "agent.json"
        self.node = node_facts(RunLayout(self.private), os.environ, attempt=1)
        self.events = self.private / "events.jsonl"
        self.docker = self._docker()
        self.has_daemon = False
        self.interruptible = True
        self.signals: list[int] = []

    def run(self) -> int:
        """All of it; what was made is removed however it ends."""
        for number in ENDING:
            signal.signal(number, self._note_signal)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
        process_tree.adopt_orphans()
        code = EXIT_NODE_ERROR
        try:
            write_json(self.trace, {"pid": os.getpid(), "PATH": os.environ.get("PATH", "")})
            node = self._prepare()
            self.interruptible = False
            code = self._hold(node)
        except _AskedToEnd as request:
            code = 128 + int(str(request))
        except (NodeError, OSError, subprocess.SubprocessError) as error:
            _say(f"{self.node.name}: {error}")
        finally:
            self.interruptible = False
            self._clean_up(keep_log=code == EXIT_NODE_ERROR and self.has_daemon)
        return code

    def clean_up_after(self, number: int) -> None:
        """For the guard, should this process be killed: every process below has ended then."""
        self._clean_up(keep_log=False)

    def finish(self) -> None:
        """What the agent has not done; while it lives, it is about to."""
        trace = read_json(self.trace) or {}
        os.environ["PATH"] = str(trace.get("PATH", os.environ["PATH"]))  # the task's own, after Slurm's task prolog
        deadline = time.monotonic() + PATIENCE_OF_EPILOG_S
        while process_tree.is_alive(int(trace.get("pid", 0))) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        self._clean_up(keep_log=False)
        shutil.rmtree(str(self.folder), ignore_errors=True)

    def _docker(self) -> RootlessDocker | None:
        rootless = self.plan.runtime == "docker-rootless"
        return RootlessDocker(self.node, self.private / "dockerd.log") if rootless else None

    def _prepare(self) -> NodeFacts:
        """Everything that the shell stands on; the facts with the GPUs."""
        node = self.node
        if self.plan.container is not None:
            node = replace(node, gpu_uuids=gpu_uuids(self.plan, node.name))
        findings = preflight.preflight(self.plan, node, os.environ)
        findings = [finding for finding in findings if finding.check not in CHECKS_OF_RUNS]
        preflight.refuse(node, findings)
        for finding in findings:
            _say(f"warning: {node.name}: {finding.text}")
        if self.docker is not None:
            _say(f"{node.name}: rootless Docker starts")
            self.has_daemon = True
            self.docker.start(self.plan)
            os.environ.update(self.docker.environment)
        if containers.is_used(self.plan):
            assert self.plan.container is not None
            _say(f"{node.name}: {self.plan.container.image} is loaded unless it is there")
            containers.sweep_orphans(self.plan, node, self.events)
            containers.ensure_image(self.plan)
        return node

    def _hold(self, node: NodeFacts) -> int:
        """The shell itself, with the terminal; its exit code."""
        argv, folder, environment = shell_argv(self.plan, node), self.plan.workdir, inherited_environment(os.environ)
        if containers.is_used(self.plan):
            argv[2:2] = self._identity(node)
            folder = str(self.private)
        else:
            environment.update({s.name: s.value or "" for s in self.plan.environment if s.name != "PYTHONPATH"})
        _say(self._where(node))
        parent = os.getpid()
        try:
            process = subprocess.Popen(
                argv,
                cwd=folder,
                env=environment,
                preexec_fn=lambda: process_tree.end_with_parent(parent, signal.SIGHUP),
            )
        except OSError as error:
            raise NodeError(f"{argv[0]} cannot be run in {folder}: {error.strerror}") from error
        while process.poll() is None and not self.signals:
            process_tree.reap(but=process.pid)
            time.sleep(POLL_S)
        if process.poll() is None:
            return self._hang_up(process)
        return 128 - process.returncode if process.returncode < 0 else process.returncode

    def _hang_up(self, process: subprocess.Popen[bytes]) -> int:
        """What a closed terminal does: a shell does not end by SIGTERM."""
        process_tree.send([process.pid], signal.SIGHUP)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_AFTER_HANGUP_S)
        return 128 + self.signals[0]

    def _identity(self, node: NodeFacts) -> list[str]:
        """By which the container is removed, here or as an orphan by a later job."""
        labels = {"run": self.plan.run_id, "job": node.job_id, "node": node.name}
        return [f"--name={self.plan.run_id}", *(f"--label=cpm.{name}={value}" for name, value in labels.items())]

    def _where(self, node: NodeFacts) -> str:
        inside = f"{self.plan.container.image} ({self.plan.runtime})" if self.plan.container else self.plan.runtime
        gpus = f"{self.plan.gpus_per_node} GPUs" if self.plan.gpus_per_node else "no GPUs"
        return f"{node.name}, {gpus}, {inside}{self._time_left()}; exit or Ctrl-D ends it"

    def _time_left(self) -> str:
        """Slurm tells its steps when the job ends since 22.05.5; before, about as long as was asked for is left."""
        if self.plan.scheduler != "slurm" or self.plan.time_limit_s is None:
            return ""
        told = os.environ.get("SLURM_JOB_END_TIME", "")
        end = int(told) if told.isdigit() else self.started + self.plan.time_limit_s
        clock = time.strftime("%H:%M", time.localtime(end))
        return f", until {clock} ({max(0, end - int(time.time())) // 60} min left)"

    def _clean_up(self, keep_log: bool) -> None:
        """Container, daemon, processes, private folder. A container of a daemon that was killed goes with the next."""
        if containers.is_used(self.plan) and (self.docker is None or self.has_daemon):
            self._remove_container()
        if self.docker is not None:
            self.docker.stop()
        process_tree.end_all(lambda: process_tree.descendants(os.getpid()), GRACE_OF_STRAGGLERS_S)
        process_tree.reap()
        if not keep_log:
            shutil.rmtree(str(self.private), ignore_errors=True)

    def _remove_container(self) -> None:
        """At once: podman would first wait for what was killed with the step, which it takes for running, to stop."""
        client = containers.CLIENTS[self.plan.runtime]
        at_once = ["--time=0"] if client == "podman" else []
        argv = [client, "rm", "--force", "--volumes", *at_once, self.plan.run_id]
        for _ in range(REMOVALS_TRIED):
            try:
                done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True)
            except OSError:
                return
            if done.returncode == 0 or b"o such container" in done.stderr:
                return
            time.sleep(POLL_S)

    def _note_signal(self, number: int, frame: FrameType | None) -> None:
        if self.interruptible:
            self.interruptible = False
            raise _AskedToEnd(str(int(number)))
        if number != signal.SIGINT:  # Ctrl-C is meant for what runs in the shell
            self.signals.append(number)


def _say(text: str) -> None:
    """A line to whoever types, unless the terminal has gone."""
    with suppress(OSError):
        print(f"cpm: {text}", file=sys.stderr, flush=True)


def main() -> int:
    """The exit code of the shell; 2 for a wrong command line."""
    words = sys.argv[1:]
    if len(words) == 2 and words[1] == "clean":
        ShellAgent(Path(words[0])).finish()
        return 0
    if len(words) != 1:
        print("usage: python PACKAGE FOLDER [clean]", file=sys.stderr)
        return 2
    # A closed terminal must not end the guard: Slurm would kill the rest while it cleans up.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    shell = ShellAgent(Path(words[0]))
    return guarded(shell.run, shell.clean_up_after)
