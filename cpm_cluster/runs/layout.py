"""Where everything lies in a run directory. Standard library only: the node agent uses it, too."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunLayout:
    """The files of one run, below `root`."""

    root: Path

    @property
    def job_file(self) -> Path:
        """The job file as written."""
        return self.root / "job.yaml"

    @property
    def resolved(self) -> Path:
        """The job with its profile, cluster, model and image filled in."""
        return self.root / "resolved.yaml"

    @property
    def plan(self) -> Path:
        """The LaunchPlan."""
        return self.root / "launch.json"

    @property
    def script(self) -> Path:
        """The batch script."""
        return self.root / "job.sbatch"

    @property
    def fit(self) -> Path:
        """What the planner said."""
        return self.root / "fit.json"

    @property
    def trainer(self) -> Path:
        """The trainer's settings."""
        return self.root / "trainer.json"

    @property
    def provenance(self) -> Path:
        """Software, machine and code state at submission."""
        return self.root / "provenance.json"

    @property
    def code(self) -> Path:
        """The snapshot of the user's code."""
        return self.root / "code"

    @property
    def package(self) -> Path:
        """The copy of the agent and the trainer that this run uses."""
        return self.root / "package"

    @property
    def submission(self) -> Path:
        """Scheduler, job id and process, written once the scheduler has taken the job."""
        return self.root / "submission.json"

    @property
    def cancel_request(self) -> Path:
        """Exists once somebody has asked to cancel the run."""
        return self.root / "control" / "cancel.json"

    @property
    def stop_request(self) -> Path:
        """Asks the ranks to save and stop at the next step."""
        return self.root / "control" / "stop"

    @property
    def verdict(self) -> Path:
        """Why the run died."""
        return self.root / "verdict.json"

    @property
    def progress(self) -> Path:
        """Where the trainer is now."""
        return self.root / "progress.json"

    @property
    def outcome(self) -> Path:
        """How the trainer ended: finished or stopped."""
        return self.root / "outcome.json"

    @property
    def heartbeats(self) -> Path:
        """A file for each rank of our trainer: what it does, and since when."""
        return self.root / "heartbeats"

    @property
    def errors(self) -> Path:
        """A file for each rank that failed."""
        return self.root / "errors"

    def events(self, writer: str) -> Path:
        """One file for each writer: nobody appends to another's."""
        return self.root / "events" / f"{writer}.jsonl"

    def telemetry(self, node: str) -> Path:
        """What the agent of a node measured while the ranks ran, a line a sample: see `telemetry.py`."""
        return self.root / "telemetry" / f"{node}.jsonl"

    def exit_record(self, node: str) -> Path:
        """How the newest attempt ended on a node."""
        return self.root / "exit" / f"{node}.json"

    def node_dir(self, attempt: int, index: int) -> Path:
        """Logs of a node's attempt: node.log, rank-R.log."""
        return self.root / f"attempt-{attempt}" / f"node-{index}"
