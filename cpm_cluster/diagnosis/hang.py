"""Which rank hangs, from the heartbeats: the one that does not beat, or that stands where the others have passed.

All ranks await the slowest in each step, so that a run that hangs stands still as a whole. A rank that hangs inside
the computation (on its GPU, or in a collective that lost another rank) cannot be told from those that wait for it.
"""

from __future__ import annotations

from collections.abc import Sequence

from cpm_cluster.runs.heartbeats import Heartbeat, read_heartbeats
from cpm_cluster.runs.records import read_events
from cpm_cluster.runs.run import Run
from cpm_cluster.runs.state import State

# A rank writes every 5 s, its node's clock may be off by some.
SILENT_S = 30.0
# Before anything is said of a rank that lags: this long, or as many steps.
PATIENCE_S, PATIENCE_STEPS = 120.0, 20.0
# And before anything is said of ranks that all stand in the same place.
PATIENCE_TOGETHER_S = 600.0
# In the order in which a step passes them; everything else lies between steps.
STEP_PHASES = ("data", "compute", "exchange")


def hang(run: Run, state: State) -> str | None:
    """One sentence on the rank that keeps the newest attempt from going on; None while nothing shows one."""
    events = [e for e in read_events(run.files.root / "events") if e.get("attempt") == state.attempt]
    begun = min((float(e["time"]) for e in events), default=0.0)
    step_seconds = (state.progress or {}).get("step_seconds") or 0.0
    return who_hangs(read_heartbeats(run.files.heartbeats, begun), float(step_seconds))


def who_hangs(beats: Sequence[Heartbeat], step_seconds: float) -> str | None:
    """The same, of heartbeats by rank; the newest of them is now."""
    if not beats or any(beat.ended in ("finished", "stopped") for beat in beats):
        return None
    now = max(beat.time for beat in beats)
    patience = max(PATIENCE_S, PATIENCE_STEPS * step_seconds)
    silent = [beat for beat in beats if now - beat.time > SILENT_S and beat.ended is None]
    if silent:
        return f"{_named(silent)} not run for {now - silent[0].time:.0f} s: stopped, or gone with the node"
    last, first = min(map(_place, beats)), max(map(_place, beats))
    behind = [beat for beat in beats if _place(beat) == last]
    age = min(beat.time - beat.since for beat in behind)
    if last < first:
        where = _where(behind[0])
        return f"{_named(behind)} not moved for {age:.0f} s{where} while the others wait" if age > patience else None
    if behind[0].phase in STEP_PHASES and age > max(PATIENCE_TOGETHER_S, patience):
        return f"no rank has moved for {age:.0f} s{_where(behind[0])}"
    return None


def _place(beat: Heartbeat) -> tuple[int, int]:
    between_steps = len(STEP_PHASES)
    return beat.step, STEP_PHASES.index(beat.phase) if beat.phase in STEP_PHASES else between_steps


def _named(beats: Sequence[Heartbeat]) -> str:
    first = f"rank {beats[0].rank} on {beats[0].host}"
    if len(beats) == 1:
        return f"{first} has"
    return f"{first} and {len(beats) - 1} other{'s' if len(beats) > 2 else ''} have"


def _where(beat: Heartbeat) -> str:
    return f" (step {beat.step}, {beat.phase})"
