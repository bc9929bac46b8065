"""What has become of a run, told from its records; nobody keeps a second truth."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from cpm_cluster.launch.plan import EXIT_STOPPED
from cpm_cluster.runs.records import read_events, read_json
from cpm_cluster.runs.run import Run, read_submission

Name = Literal["prepared", "queued", "running", "finished", "stopped", "failed", "cancelled", "lost"]
ENDED: frozenset[Name] = frozenset({"finished", "stopped", "failed", "cancelled", "lost"})
TEXTS = ("phase", "last_event")  # of progress.json, whose other values are numbers


@dataclass(frozen=True)
class State:
    """`prepared` was never submitted; `stopped` can go on; `lost` ended without a record of how.

    `phase` is the agent's or the trainer's own word, `starting` until the trainer says one; `attempt` counts from 1,
    0 before the first.
    """

    name: Name
    phase: str
    attempt: int
    exit_code: int | None
    progress: dict[str, Any] | None

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen."""
        return self.name in ENDED


def read_state(run: Run, alive: bool) -> State:
    """The state of a run; `alive` is the scheduler's word on whether it still holds the job.

    A run whose script somebody submitted by hand has no scheduler to ask: its agents' records alone tell.
    """
    events = read_events(run.files.root / "events")
    submission = read_submission(run)
    attempt = max((int(event.get("attempt", 0)) for event in events), default=0)
    progress = _progress(run) if attempt else None
    if submission and attempt < submission.attempt:
        return State("queued" if alive else _without_record(run), "", attempt, None, progress)
    if not submission and not attempt:
        return State("prepared", "", attempt, None, progress)
    exits = exit_records(run, attempt)
    phase = _phase(run, events, attempt, progress)
    if alive and _starts_again(events, attempt):
        return State("queued", "", attempt, None, progress)
    if alive or (not submission and len(exits) < run.plan.nodes):
        return State("running", phase, attempt, None, progress)
    code = _exit_code(exits)
    return State(_ended(run, exits, code), phase, attempt, code, progress)


def _progress(run: Run) -> dict[str, Any] | None:
    """What the trainer says of itself; None where what should be numbers is none."""
    record = read_json(run.files.progress) or {}
    numbers = {key: value for key, value in record.items() if key not in TEXTS and value is not None}
    if not isinstance(record.get("step", 0), int) or not all(isinstance(n, (int, float)) for n in numbers.values()):
        return None
    return record or None


def exit_records(run: Run, attempt: int) -> list[dict[str, Any]]:
    """How an attempt ended on each node that says so, the first to end first."""
    records: Iterable[dict[str, Any] | None] = map(read_json, (run.files.root / "exit").glob("*.json"))
    found = [record for record in records if record and record.get("attempt") == attempt]
    return sorted(found, key=lambda record: float(record["ended"]))


def _starts_again(events: list[dict[str, Any]], attempt: int) -> bool:
    """Whether the batch script has handed the job back to the queue after this attempt."""
    return any(e["kind"] == "decision" and e.get("attempt") == attempt and e.get("again") for e in events)


def _ended(run: Run, exits: list[dict[str, Any]], code: int | None) -> Name:
    complete = len(exits) == run.plan.nodes
    cancelled = run.files.cancel_request.exists()
    # a trainer that was asked to stop and says 0 was at its last step; another program may say 0 for any stop
    stopped_early = cancelled and run.plan.trainer is None and any(record.get("stopped_by") for record in exits)
    if complete and code == 0 and not stopped_early:
        return "finished"
    if cancelled:
        return "cancelled"
    if code is None or not complete:
        return "lost" if code in (None, 0) else "failed"
    return "stopped" if code == EXIT_STOPPED else "failed"


def _without_record(run: Run) -> Name:
    return "cancelled" if run.files.cancel_request.exists() else "lost"


def _exit_code(exits: list[dict[str, Any]]) -> int | None:
    """The code of the node that failed first, else of one that stopped, else 0."""
    codes = [int(record["exit_code"]) for record in exits]
    bad = [code for code in codes if code not in (0, EXIT_STOPPED)]
    return next(iter(bad), max(codes, default=None))


def _phase(run: Run, events: list[dict[str, Any]], attempt: int, progress: dict[str, Any] | None) -> str:
    phases = [e for e in events if e["kind"] == "phase" and e.get("attempt") == attempt]
    if not phases:
        return ""
    phase = str(phases[-1].get("phase", ""))
    if phase != "training" or run.plan.trainer is None:
        return phase
    # an earlier attempt may have left its progress
    is_fresh = progress and float(progress.get("updated_at", 0)) >= float(phases[-1]["time"])
    return str(progress.get("phase", phase)) if progress and is_fresh else "starting"
