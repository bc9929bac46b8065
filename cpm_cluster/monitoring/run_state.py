"""The state of a run: its records, the scheduler's word, and the verdict once it has ended."""

from __future__ import annotations

import contextlib
import time
from dataclasses import asdict, replace
from typing import Any

from cpm_cluster.diagnosis.diagnose import diagnose
from cpm_cluster.diagnosis.hang import hang
from cpm_cluster.diagnosis.retry import read_endings
from cpm_cluster.diagnosis.scheduler_says import as_the_scheduler_says, leaves_open
from cpm_cluster.diagnosis.verdict import Verdict
from cpm_cluster.runs.job_end import JobEnd, record_job_end, recorded_job_end
from cpm_cluster.runs.records import read_events, read_json, write_json
from cpm_cluster.runs.run import Run, Submission, read_submission
from cpm_cluster.runs.state import State, read_state
from cpm_cluster.runs.telemetry import run_telemetry
from cpm_cluster.schedulers import IsAlive, SchedulerError, open_scheduler

ACCOUNTING_LATENCY_S = 600.0


class Look:
    """One look at the schedulers, for any number of runs."""

    def __init__(self) -> None:
        self._taken: dict[str, IsAlive] = {}

    def is_alive(self, run: Run, submission: Submission) -> bool:
        """What the scheduler of a run says; each is looked at once, when its first run is asked about."""
        name = submission.scheduler
        if name not in self._taken:
            self._taken[name] = open_scheduler(name).look()
        return self._taken[name](run, submission)


def current_state(run: Run, look: Look | None = None) -> State:
    """What has become of a run; `look` is shared between runs that are asked about together.

    Raises:
        SchedulerError: its end is not recorded, and only another machine knows whether it goes on.
    """
    submission = read_submission(run)
    if submission is None:
        return read_state(run, alive=False)
    scheduler = open_scheduler(submission.scheduler)
    try:
        alive = (look or scheduler).is_alive(run, submission)
    except SchedulerError:
        recorded = read_state(run, alive=False)
        if recorded.name == "lost":
            raise
        return recorded
    state = read_state(run, alive)
    return state if state.name != "queued" else replace(state, phase=scheduler.waiting_for(run, submission))


def settle(run: Run, state: State) -> Verdict | None:
    """The verdict on a run that has ended, recorded in it unless it is somebody else's to write to."""
    verdict = diagnose(run, state)
    if verdict is not None and leaves_open(verdict) and (end := _job_end(run, state)):
        verdict = as_the_scheduler_says(verdict, end)
    if verdict is not None and read_json(run.files.verdict) != (recorded := _plain(verdict)):
        with contextlib.suppress(OSError):
            write_json(run.files.verdict, recorded)
    return verdict


def _job_end(run: Run, state: State) -> JobEnd | None:
    """How the scheduler says that the job ended; kept in the run, since it forgets."""
    submission = read_submission(run)
    if submission is None:
        return None
    known = recorded_job_end(run, state.attempt, submission.job_id)
    if known is not None and (known.is_final or _was_settled_long_ago(run)):
        return known
    told = open_scheduler(submission.scheduler).ended_as(run, submission)
    if told is None or told == known:
        return known
    if known is None or told.is_final:
        with contextlib.suppress(OSError):
            record_job_end(run, state.attempt, told)
    return told


def _was_settled_long_ago(run: Run) -> bool:
    """What accounting has not said by then it will not say, and a list of many runs has no time to ask."""
    try:
        return time.time() - run.files.verdict.stat().st_mtime > ACCOUNTING_LATENCY_S
    except OSError:
        return False


def as_data(run: Run, state: State, verdict: Verdict | None = None) -> dict[str, Any]:
    """A run as --json shows it.

    `endings` are those of attempts on Slurm; `telemetry` (see `runs/telemetry.py`) is there once an agent has taken a
    sample; `hang` where a rank keeps the run from going on, a sentence that says which.
    """
    fields = asdict(state)
    telemetry = run_telemetry(run.files.root / "telemetry")
    hung = None if state.ended else hang(run, state)
    return {
        "run": run.id,
        "run_dir": str(run.files.root),
        "state": fields.pop("name"),
        **fields,
        "endings": [asdict(ending) for ending in read_endings(read_events(run.files.root / "events"))],
        "verdict": _plain(verdict) if verdict else None,
        **({"telemetry": telemetry} if telemetry else {}),
        **({"hang": hung} if hung else {}),
    }


def _plain(verdict: Verdict) -> dict[str, Any]:
    """As JSON gives it back: lists, no tuples."""
    return {**asdict(verdict), "evidence": [asdict(item) for item in verdict.evidence]}
