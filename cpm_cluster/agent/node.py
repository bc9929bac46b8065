"""One process per node: prepares, starts the program, passes requests on to it, cleans up, records how it ended.

Phases, each an event: prepare, image (containers), training, cleanup. Exit codes: 0 finished; 85 stopped with a
checkpoint before the time limit; 2 the user can correct it; 3 this node cannot run the job; 128 + n ended by
signal n; otherwise the program's own.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import IO

from cpm_cluster.agent import containers, process_tree
from cpm_cluster.agent.surroundings import (
    SECRETS_FILE,
    NodeError,
    home_file,
    inherited_environment,
    node_facts,
    secret_values,
)
from cpm_cluster.launch.plan import EXIT_STOPPED, LaunchPlan, NodeFacts
from cpm_cluster.launch.program import program_environment
from cpm_cluster.launch.runtimes import run_argv
from cpm_cluster.runs.layout import RunLayout
from cpm_cluster.runs.records import append_event, read_json, write_json, write_text

EXIT_USER_ERROR, EXIT_NODE_ERROR = 2, 3
# Slurm's KillWait is 30 s: what is not saved by then is lost anyway.
GRACE_AFTER_TERM_S = 25.0
GRACE_OF_STRAGGLERS_S = 5.0
# Of the time before the limit; the rest is for cleaning up.
LEAD_USED = 0.8
POLL_S = 0.1


class NodeAgent:
    """The life of one attempt on one node."""

    def __init__(self, run_dir: Path) -> None:
        self.files = RunLayout(run_dir)
        self.plan = LaunchPlan.from_json(self.files.plan.read_text(encoding="utf-8"))
        self.signals: list[int] = []
        self.stopped_by: int | None = None
        self.deadline: float | None = None
        self.started = time.time()

    def run(self) -> int:
        """All phases; cleanup and the exit record always happen."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
            signal.signal(number, self._note_signal)
        process_tree.adopt_orphans()
        code = EXIT_NODE_ERROR
        node = None
        try:
            node = node_facts(self.plan, self.files, os.environ)
            self._enter(node, "prepare", pid=os.getpid())
            code = self._attempt(node)
        except (NodeError, OSError) as error:
            print(f"cpm: {error}", file=sys.stderr, flush=True)
            if node is not None:
                append_event(self.files.events(node.name), "error", attempt=node.attempt, message=str(error))
        finally:
            if node is not None:
                self._enter(node, "cleanup")
                clean = self._clean_up(node)
                self._record_exit(node, code, clean)
        return code

    def _attempt(self, node: NodeFacts) -> int:
        environment = {
            **program_environment(self.plan, node, str(self.files.node_dir(node.attempt, node.index))),
            **secret_values(self.plan.secrets, home_file(SECRETS_FILE)),
        }
        if node.index == 0 and self.files.stop_request.exists():
            self.files.stop_request.unlink()
        if self.plan.container is not None:
            self._enter(node, "image")
            containers.ensure_image(self.plan)
            lines = "".join(f"{name}={value}\n" for name, value in sorted(environment.items()))
            write_text(Path(node.environment_file), lines, 0o600)
            environment = {}
        with open(self.files.node_dir(node.attempt, node.index) / "node.log", "ab") as log:
            return self._train(node, environment, log)

    def _train(self, node: NodeFacts, environment: dict[str, str], log: IO[bytes]) -> int:
        self._enter(node, "training")
        agent = os.getpid()
        process = subprocess.Popen(
            run_argv(self.plan, node),
            cwd=str(self.files.code),
            env={**inherited_environment(os.environ), **environment},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=lambda: process_tree.end_with_parent(agent),
        )
        while process.poll() is None:
            self._pass_on_requests(node, process)
            time.sleep(POLL_S)
        return self._exit_code(process.returncode)

    def _pass_on_requests(self, node: NodeFacts, process: subprocess.Popen[bytes]) -> None:
        """A first signal asks for a checkpoint; a second one, or the deadline, ends the program."""
        while self.signals:
            number = self.signals.pop(0)
            append_event(
                self.files.events(node.name), "signal", attempt=node.attempt, signal=signal.Signals(number).name
            )
            if self.stopped_by is None or (self.stopped_by == signal.SIGUSR2 and number != signal.SIGUSR2):
                self._ask_to_stop(number, process)
            elif number != signal.SIGUSR2:
                self.deadline = time.monotonic()
        if self.deadline is not None and time.monotonic() >= self.deadline:
            append_event(self.files.events(node.name), "killed", attempt=node.attempt, message="did not stop in time")
            process_tree.end_all(lambda: process_tree.descendants(os.getpid()), GRACE_OF_STRAGGLERS_S)

    def _ask_to_stop(self, number: int, process: subprocess.Popen[bytes]) -> None:
        self.stopped_by = number
        grace = LEAD_USED * self.plan.signal_lead_s if number == signal.SIGUSR2 else GRACE_AFTER_TERM_S
        self.deadline = time.monotonic() + grace
        if self.plan.trainer is None:
            process_tree.send([process.pid], number)
        else:
            # torchrun would give its ranks 30 s after SIGTERM, and passes USR2 on to nobody
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
        if self.plan.container is not None:
            containers.remove(self.plan, node, self.files.events(node.name))
            Path(node.environment_file).unlink(missing_ok=True)
        clean = process_tree.end_all(lambda: process_tree.descendants(os.getpid()), GRACE_OF_STRAGGLERS_S)
        process_tree.reap()
        return clean

    def _record_exit(self, node: NodeFacts, code: int, clean: bool) -> None:
        record = {
            "format": 1,
            "node": node.name,
            "index": node.index,
            "attempt": node.attempt,
            "exit_code": code,
            "stopped_by": signal.Signals(self.stopped_by).name if self.stopped_by else None,
            "clean": clean,
            "started": self.started,
            "ended": time.time(),
        }
        write_json(self.files.exit_record(node.name), record)
        append_event(self.files.events(node.name), "exit", attempt=node.attempt, exit_code=code)

    def _enter(self, node: NodeFacts, phase: str, **details: object) -> None:
        append_event(self.files.events(node.name), "phase", phase=phase, attempt=node.attempt, **details)

    def _note_signal(self, number: int, frame: FrameType | None) -> None:
        self.signals.append(number)
