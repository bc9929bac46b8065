"""What each rank of our trainer says it does: ``heartbeats/rank-R.json``, rewritten every few seconds.

`since`: when the rank entered the phase it is in; `time`: when it said so, by its node's clock. `ended` is how the rank
ended, None while it runs, and for ever where it was killed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cpm_cluster.runs.records import read_json


@dataclass(frozen=True)
class Heartbeat:
    """Times in seconds since the epoch; `step` is the one in progress, between steps the last one finished."""

    rank: int
    host: str
    step: int
    phase: str
    since: float
    time: float
    ended: str | None


def read_heartbeats(folder: Path, begun: float) -> list[Heartbeat]:
    """By rank; those from before an attempt had begun are left out."""
    found = [beat for path in folder.glob("rank-*.json") if (beat := _read(path)) and beat.time >= begun]
    return sorted(found, key=lambda beat: beat.rank)


def _read(path: Path) -> Heartbeat | None:
    record = read_json(path) or {}
    try:
        rank, step = int(record["rank"]), int(record["step"])
        since, time = float(record["since"]), float(record["time"])
        return Heartbeat(rank, str(record["host"]), step, str(record["phase"]), since, time, record["ended"])
    except (KeyError, TypeError, ValueError):
        return None
