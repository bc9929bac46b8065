"""One process per node: prepares, starts the program, passes requests on to it, cleans up, records how it ended.

Phases, each an event: prepare, preflight, then for containers docker (a daemon of the job's own, where it is rootless)
and image; training, with telemetry; cleanup. Exit codes: 0 finished; 85 stopped with a
checkpoint before the time limit; 2 the user can correct it; 3 this node cannot run the job; 128 + n ended by
signal n; otherwise the program's own.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import IO

from cpm_cluster.agent import containers, preflight, process_tree
from cpm_cluster.agent.gathering import gather
from cpm_cluster.agent.guard import PASSED_ON
from cpm_cluster.agent.requeue import take_over
from cpm_cluster.agent.rootless_docker import RootlessDocker
from cpm_cluster.agent.surroundings import (
    SECRETS_FILE,
    NodeError,
    gpu_uuids,
    home_file,
    inherited_environment,
    newest_attempt,
    node_facts,
    secret_values,
)
from cpm_cluster.agent.telemetry import Telemetry
from cpm_cluster.launch.plan import EXIT_STOPPED, LaunchPlan, NodeFacts
from cpm_cluster.launch.program import program_environment
from cpm_cluster.launch.runtimes import run_argv
from cpm_cluster.runs.layout import RunLayout
from cpm_cluster.runs.records import append_event, read_json, write_json, write_text

EXIT_USER_ERROR, EXIT_NODE_ERROR = 2, 3
EXIT_OF_DOCKER = 125  # of docker itself, not of the container (docker run, "Exit Status")
# Slurm's KillWait is 30 s: what is not saved by then is lost anyway.
GRACE_AFTER_TERM_S = 25.0
GRACE_OF_STRAGGLERS_S = 5.0
# For what was asked and had its time.
GRACE_OF_THE_LATE_S = 1.0
# Of the time before the limit; the rest is for cleaning up.
LEAD_USED = 0.8
POLL_S = 0.1
LOOK_FOR_SUCCESSOR_S = 5.0


# How long a node that saved waits for the others to end too, before srun ends the step for the first that leaves.
PATIENCE_WITH_OTHERS_S = 60.0


class _AskedToEnd(Exception):
    """A signal came before there was anything to save."""


class NodeAgent:
    """The life of one attempt on one node."""

    def __init__(self, run_dir: Path) -> None:
        self.files = RunLayout(run_dir)
        self.plan = LaunchPlan.from_json(self.files.plan.read_text(encoding="utf-8"))
        self.signals: list[int] = []
        self.stopped_by: int | None = None
        self.deadline: float | None = None
        self.preparing = False
        self.has_secrets_on_disk = False
        self.docker: RootlessDocker | None = None
        self.ending = False
        self.killed = False
        self.next_look = 0.0
        self.started = time.time()

    def run(self) -> int:
        """All phases; cleanup and the exit record always happen."""
        for number in PASSED_ON:
            signal.signal(number, self._note_signal)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
        process_tree.adopt_orphans()
        code = EXIT_NODE_ERROR
        node = None
        try:
            node = node_facts(self.files, os.environ)
            self._enter(node, "prepare", pid=os.getpid())
            code = self._attempt(node)
        except _AskedToEnd as request:
            self.stopped_by = int(str(request))
            code = 128 + self.stopped_by
        except (NodeError, OSError, subprocess.SubprocessError) as error:
            print(f"cpm: {error}", file=sys.stderr, flush=True)
            if node is not None:
                blamed = error.blamed if isinstance(error, NodeError) else ()
                append_event(
                    self.files.events(node.name), "error", attempt=node.attempt, message=str(error), blamed=blamed
                )
        finally:
            if node is not None:
                self._enter(node, "cleanup")
                clean = self._clean_up(node)
                self._record_exit(node, code, clean)
                self._leave_together(node, code)
            # whoever leaves first has srun end the others, whose codes are told already
            for number in PASSED_ON:
                signal.signal(number, signal.SIG_IGN)
        return code

    def clean_up_after(self, number: int) -> None:
        """What `run` would have done at its end, had signal `number` not killed it; for the guard and its survivors."""
        node = node_facts(self.files, os.environ, newest_attempt(self.files))
        if self.plan.runtime == "docker-rootless":
            self.docker = RootlessDocker(node, self.files.node_dir(node.attempt, node.index) / "dockerd.log")
            os.environ.update(self.docker.environment)
        clean = self._clean_up(node)
        if (read_json(self.files.exit_record(node.name)) or {}).get("attempt") != node.attempt:
            name = signal.Signals(number).name
            append_event(self.files.events(node.name), "agent_killed", attempt=node.attempt, signal=name)
            self._record_exit(node, 128 + number, clean)

    def clean_up_if_lost(self) -> int:
        """Where an attempt's agent and guard have ended without a record: what they would have done; 0."""
        attempt = int(os.environ.get("CPM_ATTEMPT", newest_attempt(self.files)))
        name = node_facts(self.files, os.environ, attempt).name
        if (read_json(self.files.exit_record(name)) or {}).get("attempt") != attempt:
            self.clean_up_after(signal.SIGKILL)
        return 0

    def _attempt(self, node: NodeFacts) -> int:
        self.preparing = True
        node = self._prepare(node)
        self.preparing = False
        environment = {
            **program_environment(self.plan, node, str(self.files.node_dir(node.attempt, node.index))),
            **secret_values(self.plan.secrets, home_file(SECRETS_FILE)),
        }
        if node.index == 0:
            self._forget_earlier_attempts()
            if self.plan.scheduler == "slurm":
                take_over(self.files.root, node.job_id, node.attempt)
        if containers.is_used(self.plan):
            lines = "".join(f"{name}={value}\n" for name, value in sorted(environment.items()))
            write_text(Path(node.environment_file), lines, 0o600)
            self.has_secrets_on_disk = True
            environment = {}
        with open(self.files.node_dir(node.attempt, node.index) / "node.log", "ab") as log:
            return self._train(node, environment, log)

    def _prepare(self, node: NodeFacts) -> NodeFacts:
        """Find out what is wrong before it costs anything; the facts with the GPUs and the port of this attempt."""
        self._enter(node, "preflight")
        if self.plan.container is not None:
            node = replace(node, gpu_uuids=gpu_uuids(self.plan, node.name))
        findings = preflight.preflight(self.plan, node, os.environ)
        self._record(node, findings)
        preflight.refuse(node, findings)
        gathered = gather(self.plan, node, os.environ.get("CPM_NODES", node.name).split(","))
        self._record(node, preflight.clock(gathered.clock_skew_s))
        if self.plan.runtime == "docker-rootless":
            self._enter(node, "docker")
            self.docker = RootlessDocker(node, self.files.node_dir(node.attempt, node.index) / "dockerd.log")
            self.docker.start(self.plan)
            os.environ.update(self.docker.environment)
        if containers.is_used(self.plan):
            self._enter(node, "image")
            containers.sweep_orphans(self.plan, node, self.files.events(node.name))
            image = containers.ensure_image(self.plan)
            append_event(self.files.events(node.name), "image", attempt=node.attempt, id=image)
        return replace(node, master_port=str(gathered.port))

    def _record(self, node: NodeFacts, findings: list[preflight.Finding]) -> None:
        for finding in findings:
            append_event(self.files.events(node.name), "finding", attempt=node.attempt, **vars(finding))

    def _forget_earlier_attempts(self) -> None:
        """How they ended must not be taken for how this one does. No rank is there before node 0's launcher."""
        for path in (self.files.stop_request, self.files.outcome, *self.files.errors.glob("rank-*.json")):
            path.unlink(missing_ok=True)

    def _train(self, node: NodeFacts, environment: dict[str, str], log: IO[bytes]) -> int:
        if self.signals:  # asked to stop before there is anything to save
            self.stopped_by = self.signals[0]
            return 128 + self.stopped_by
        self._enter(node, "training")
        process = self._start(run_argv(self.plan, node), environment, log)
        telemetry = Telemetry(self.files, self.plan, node)
        # what was told to end together with the program, as a child of a shell is, may take as long to save
        while process.poll() is None or (self.ending and process_tree.group_exists(process.pid)):
            self._pass_on_requests(node, process)
            self._forget_secrets(node)
            self._give_way(node)
            telemetry.poll()
            process_tree.reap(but=process.pid)
            time.sleep(POLL_S)
        telemetry.close()
        if process.returncode == EXIT_OF_DOCKER and self.docker is not None:
            self.docker.require_running()
        return self._exit_code(process.returncode)

    def _start(self, argv: list[str], environment: dict[str, str], log: IO[bytes]) -> subprocess.Popen[bytes]:
        """Start the program in a session and process group of its own.

        The trainer does not start among the user's files: one called queue.py would be imported in place of Python's.
        """
        folder = self.files.code if self.plan.trainer is None else self.files.root
        try:
            return process_tree.start_child(argv, {**inherited_environment(os.environ), **environment}, log, folder)
        except OSError as error:
            raise NodeError(f"{argv[0]} cannot be run on this node: {error.strerror}") from error

    def _pass_on_requests(self, node: NodeFacts, process: subprocess.Popen[bytes]) -> None:
        """USR2 asks for a checkpoint, another signal to end, the next one to end at once."""
        while self.signals:
            number = self.signals.pop(0)
            append_event(
                self.files.events(node.name), "signal", attempt=node.attempt, signal=signal.Signals(number).name
            )
            if number == signal.SIGUSR2 and self.stopped_by is None:
                self._warn(process)
            elif number != signal.SIGUSR2 and not self.ending:
                self._ask_to_end(number, process)
            elif number != signal.SIGUSR2:
                self.deadline = time.monotonic()
        if self.deadline is not None and time.monotonic() >= self.deadline:
            if not self.killed:
                append_event(self.files.events(node.name), "killed", attempt=node.attempt)
            self.killed = True
            process_tree.end_all(lambda: process_tree.descendants(os.getpid()), GRACE_OF_THE_LATE_S)

    def _warn(self, process: subprocess.Popen[bytes]) -> None:
        """The time limit is near. Whoever has no handler for USR2 would die of it: a shell, tee, torchrun."""
        self.stopped_by = signal.SIGUSR2
        self.deadline = time.monotonic() + LEAD_USED * self.plan.signal_lead_s
        if self.plan.trainer is None:
            process_tree.send(process_tree.handlers_of(process.pid, signal.SIGUSR2), signal.SIGUSR2)
        else:
            write_text(self.files.stop_request, "")

    def _ask_to_end(self, number: int, process: subprocess.Popen[bytes]) -> None:
        self.ending = True
        self.stopped_by = self.stopped_by or number
        self.deadline = min(self.deadline or math.inf, time.monotonic() + GRACE_AFTER_TERM_S)
        if self.plan.trainer is None:
            process_tree.send_to_group(process.pid, number)
        else:  # not through torchrun, which kills its ranks 30 s after a SIGTERM
            write_text(self.files.stop_request, "")

    def _exit_code(self, returncode: int) -> int:
        """What the program's end means: torchrun says 1 for whatever its ranks did."""
        code = 128 - returncode if returncode < 0 else returncode
        if self.plan.trainer is None:
            return code
        outcome = read_json(self.files.outcome) or {}
        if outcome.get("outcome") == "stopped" and self.stopped_by is not None:
            return EXIT_STOPPED if self.stopped_by == signal.SIGUSR2 else 128 + self.stopped_by
        if code and any((read_json(path) or {}).get("user_error") for path in self.files.errors.glob("rank-*.json")):
            return EXIT_USER_ERROR
        return code

    def _clean_up(self, node: NodeFacts) -> bool:
        """Remove the container, the environment file and every process below; whether nothing is left."""
        self.preparing = False
        if self.docker is not None:
            self.docker.revive()
        if containers.is_used(self.plan):
            containers.remove(self.plan, node, self.files.events(node.name))
            Path(node.environment_file).unlink(missing_ok=True)
        no_daemon = self.docker is None or self.docker.stop()
        clean = no_daemon and process_tree.end_all(lambda: process_tree.descendants(os.getpid()), GRACE_OF_STRAGGLERS_S)
        process_tree.reap()
        return clean

    def _give_way(self, node: NodeFacts) -> None:
        """A node that Slurm has lost may come back when the next attempt runs elsewhere: two must not write one run."""
        if time.monotonic() < self.next_look:
            return
        self.next_look = time.monotonic() + LOOK_FOR_SUCCESSOR_S
        if self.deadline is None and self.files.node_dir(node.attempt + 1, 0).parent.exists():
            append_event(self.files.events(node.name), "superseded", attempt=node.attempt)
            self.deadline = time.monotonic()

    def _forget_secrets(self, node: NodeFacts) -> None:
        """Once the container is there, its environment file has been read."""
        if self.has_secrets_on_disk and Path(node.container_id_file).exists():
            Path(node.environment_file).unlink(missing_ok=True)
            self.has_secrets_on_disk = False

    def _record_exit(self, node: NodeFacts, code: int, clean: bool) -> None:
        if ((read_json(self.files.exit_record(node.name)) or {}).get("attempt") or 0) > node.attempt:
            return
        record = {
            "format": 1,
            "node": node.name,
            "index": node.index,
            "attempt": node.attempt,
            "exit_code": code,
            "stopped_by": signal.Signals(self.stopped_by).name if self.stopped_by else None,
            "killed": self.killed,
            "clean": clean,
            "started": self.started,
            "ended": time.time(),
        }
        write_json(self.files.exit_record(node.name), record)
        append_event(self.files.events(node.name), "exit", attempt=node.attempt, exit_code=code)

    def _leave_together(self, node: NodeFacts, code: int) -> None:
        """With --kill-on-bad-exit the first node that says 85 would have the others ended, and their codes lost."""
        deadline = time.monotonic() + PATIENCE_WITH_OTHERS_S
        while code == EXIT_STOPPED and time.monotonic() < deadline:
            records = map(read_json, (self.files.root / "exit").glob("*.json"))
            if sum(1 for record in records if record and record.get("attempt") == node.attempt) >= self.plan.nodes:
                return
            time.sleep(POLL_S)

    def _enter(self, node: NodeFacts, phase: str, **details: object) -> None:
        append_event(self.files.events(node.name), "phase", phase=phase, attempt=node.attempt, **details)

    def _note_signal(self, number: int, frame: FrameType | None) -> None:
        self.signals.append(number)
        if self.preparing and number != signal.SIGUSR2:
            raise _AskedToEnd(str(number))
