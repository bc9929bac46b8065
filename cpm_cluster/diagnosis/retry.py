"""Whether a job that ended shall start again, and on which nodes it shall not: by category, within a budget.

What comes from outside is worth another attempt (preemption, the time limit, a node, the fabric); what the job does
to itself is not (a user's error, too little memory, NaN). Progress gives the budget back: a week of training may be
preempted any number of times, a job that dies before its next checkpoint again and again may not go on for ever.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cpm_cluster.diagnosis.verdict import Verdict

# Attempts without a new checkpoint that a category may cause.
BUDGETS: Mapping[str, int] = {
    "time limit": 3,
    "preempted": 20,
    "node": 4,
    "lost": 4,
    "fabric": 3,
    "killed": 2,
}
# A node is mended, or taken out by the admin, within a day.
AVOIDED_FOR_S = 24 * 3600.0
# More nodes than this at fault means that the fault is not theirs.
MOST_AVOIDED = 4


@dataclass(frozen=True)
class Ending:
    """How an attempt ended: `step` of the newest checkpoint then, the node at fault, seconds since 1970."""

    attempt: int
    category: str
    step: int
    node: str | None
    time: float
    cause: str = ""


@dataclass(frozen=True)
class Decision:
    """Whether to start again, the sentence that says why, and the nodes to leave out."""

    again: bool
    why: str
    avoid: tuple[str, ...] = ()


def decide(verdict: Verdict, endings: Sequence[Ending], submitted: float) -> Decision:
    """The decision after the last of `endings`, which `verdict` explains.

    A person who submits the run again (`submitted`, seconds since 1970) renews the budgets.
    """
    budget = BUDGETS.get(verdict.category, 0)
    if not verdict.transient:
        return Decision(False, "the same job would end like this again")
    if not budget:
        return Decision(False, "somebody ended it, and may start it again")
    used = _without_progress([e for e in endings if e.time >= submitted])
    if used > budget:
        return Decision(False, f"it ended like this {used} times ({verdict.category}) without a new checkpoint")
    return Decision(True, f"start {used} of at most {budget} without a new checkpoint", avoided(endings))


def avoided(endings: Sequence[Ending]) -> tuple[str, ...]:
    """Nodes that were at fault within a day of the last ending, those of the newest first, at most four."""
    now = endings[-1].time if endings else 0.0
    named = [e.node for e in reversed(endings) if e.node and now - e.time < AVOIDED_FOR_S]
    return tuple(dict.fromkeys(named))[:MOST_AVOIDED]


def read_endings(events: Iterable[Mapping[str, Any]]) -> list[Ending]:
    """The endings in a run's events."""
    found = [event for event in events if event.get("kind") == "ending"]
    return [Ending(e["attempt"], e["category"], e["step"], e.get("node"), e["time"], e.get("cause", "")) for e in found]


def _without_progress(endings: Sequence[Ending]) -> int:
    """How many of the last endings are of the newest one's category, at its checkpoint."""
    last = endings[-1]
    return sum(1 for e in endings if e.category == last.category and e.step == last.step)
