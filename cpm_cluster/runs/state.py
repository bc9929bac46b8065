"""What has become of a run, told from its records; nobody keeps a second truth."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from cpm_cluster.launch.plan import EXIT_STOPPED
from cpm_cluster.runs.records import read_events, read_json
from cpm_cluster.runs.run import Run

Name = Literal["prepared", "queued", "running", "finished", "stopped", "failed", "cancelled", "lost"]
ENDED: frozenset[Name] = frozenset({"finished", "stopped", "failed", "cancelled", "lost"})


@dataclass(frozen=True)
class State:
    """`prepared` was never submitted; `stopped` can go on; `lost` ended without a record of how.

    `phase` is the agent's or the trainer's own word; `attempt` counts from 1, 0 before the first.
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
    """The state of a run; `alive` is the scheduler's word on whether it still holds the job."""
    events = read_events(run.files.root / "events")
    attempt = max((int(event.get("attempt", 0)) for event in events), default=0)
    exits = [record for record in _exit_records(run) if record["attempt"] == attempt]
    progress = read_json(run.files.progress) if attempt else None
    phase = _phase(events, attempt, progress)
    if alive:
        return State("running" if attempt else "queued", phase, attempt, None, progress)
    if not run.files.submission.exists():
        return State("prepared", "", attempt, None, progress)
    code = _exit_code(exits)
    return State(_ended(run, exits, code), phase, attempt, code, progress)


def _ended(run: Run, exits: list[dict[str, Any]], code: int | None) -> Name:
    if len(exits) == run.plan.nodes and code == 0:
        return "finished"
    if run.files.cancel_request.exists():
        return "cancelled"
    if code is None or len(exits) < run.plan.nodes:
        return "lost" if code in (None, 0) else "failed"
    return "stopped" if code == EXIT_STOPPED else "failed"


def _exit_records(run: Run) -> Iterable[dict[str, Any]]:
    paths = sorted((run.files.root / "exit").glob("*.json"))
    return [record for path in paths if (record := read_json(path)) and "attempt" in record]


def _exit_code(exits: list[dict[str, Any]]) -> int | None:
    """The code of the node that failed first, else of one that stopped, else 0."""
    codes = [int(record["exit_code"]) for record in sorted(exits, key=lambda record: float(record["ended"]))]
    bad = [code for code in codes if code not in (0, EXIT_STOPPED)]
    return next(iter(bad), max(codes, default=None))


def _phase(events: list[dict[str, Any]], attempt: int, progress: dict[str, Any] | None) -> str:
    phases = [str(e["phase"]) for e in events if e["kind"] == "phase" and e.get("attempt") == attempt]
    phase = phases[-1] if phases else ""
    return str(progress.get("phase", phase)) if phase == "training" and progress else phase
