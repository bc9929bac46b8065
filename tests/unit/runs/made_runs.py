"""Run directories made of records alone: no process, no scheduler."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from cpm_cluster.launch.plan import Container, LaunchPlan, Program
from cpm_cluster.runs.layout import RunLayout
from cpm_cluster.runs.records import append_event, write_json, write_text
from cpm_cluster.runs.run import Run, Submission, write_submission

TORCHRUN = Program("torchrun", "python", 2, ("-m", "trainer"))
ANY_PROGRAM = Program("none", "", 1, ("bash", "train.sh"))


def container(**settings: Any) -> Container:
    """A container of which only some settings matter."""
    empty = {str: "", bool: False}
    unused = {name: empty.get(hint) for name, hint in get_type_hints(Container).items()}
    return Container(**{**unused, "mounts": (), "sm": (), **settings})  # type: ignore[arg-type]


class MadeRun:
    """A run whose records a test writes one after the other."""

    def __init__(self, runs_dir: Path, run_id: str, trainer: bool, nodes: int, scheduler: str, **plan: Any) -> None:
        root = runs_dir / run_id
        settings = {
            "run_id": run_id,
            "run_dir": str(root),
            "job_name": run_id[:-21],
            "scheduler": scheduler,
            "runtime": "bare",
            "nodes": nodes,
            "gpus_per_node": 0,
            "time_limit_s": None,
            "signal_lead_s": 30,
            "requeue": False,
            "batch": (),
            "step": (),
            "interactive": (),
            "modules": (),
            "conda_environment": None,
            "agent_python": "python",
            "container": None,
            "program": TORCHRUN if trainer else ANY_PROGRAM,
            "environment": (),
            "secrets": (),
            "workdir": f"{root}/code",
            "workdir_set_by": "computed",
            "trainer": {} if trainer else None,
        }
        self.run = Run(RunLayout(root), LaunchPlan(**{**settings, **plan}))  # type: ignore[arg-type]
        write_text(self.run.files.plan, self.run.plan.to_json())

    def submitted(self, attempt: int = 1) -> MadeRun:
        """The scheduler has taken it, once more for a later attempt."""
        write_submission(self.run, Submission("local", "1", "here", attempt))
        return self

    def event(self, kind: str, node: str = "n1", **details: Any) -> MadeRun:
        """An agent's event."""
        append_event(self.run.files.events(node), kind, **details)
        return self

    def phase(self, phase: str, attempt: int = 1, node: str = "n1") -> MadeRun:
        """The agent enters a phase."""
        return self.event("phase", node, phase=phase, attempt=attempt)

    def exited(self, code: int, attempt: int = 1, node: str = "n1", ended: float = 1.0, **more: Any) -> MadeRun:
        """The agent of a node records how its attempt ended."""
        record = {"node": node, "attempt": attempt, "exit_code": code, "ended": ended, "stopped_by": None}
        write_json(self.run.files.exit_record(node), {**record, **more})
        return self.event("exit", node, attempt=attempt, exit_code=code)

    def cancelled(self) -> MadeRun:
        """Somebody has asked for its end."""
        write_json(self.run.files.cancel_request, {"time": 0})
        return self

    def file(self, name: str, content: str | dict[str, Any]) -> MadeRun:
        """Any other file."""
        write_text(self.run.files.root / name, content if isinstance(content, str) else json.dumps(content))
        return self

    def rank_error(self, rank: int, time: float, type_: str = "RuntimeError", **more: Any) -> MadeRun:
        """What a rank of the trainer records when it fails."""
        record = {"rank": rank, "type": type_, "message": f"of rank {rank}", "time": time, "user_error": False}
        return self.file(f"errors/rank-{rank}.json", {**record, "file": "/x/y.py", "line": 7, **more})


@pytest.fixture
def made_run(tmp_path):
    """Make runs: `made_run(trainer=False).submitted().phase("training")`."""

    def make(run_id="job-20260102-030405-0001", trainer=True, nodes=1, scheduler="local", **plan):
        return MadeRun(tmp_path / "runs", run_id, trainer, nodes, scheduler, **plan)

    return make
