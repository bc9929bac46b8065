"""The state of a run as the verbs need it: records, the scheduler's word, and the verdict once it has ended."""

from __future__ import annotations

import contextlib
from dataclasses import asdict, replace
from typing import Any

from cpm_cluster.diagnosis.diagnose import diagnose
from cpm_cluster.diagnosis.verdict import Verdict
from cpm_cluster.runs.records import read_json, write_json
from cpm_cluster.runs.run import Run, read_submission
from cpm_cluster.runs.state import State, read_state
from cpm_cluster.schedulers import SchedulerError, open_scheduler


def current_state(run: Run) -> State:
    """What has become of a run.

    Raises:
        SchedulerError: its end is not recorded, and only another machine knows whether it goes on.
    """
    submission = read_submission(run)
    if submission is None:
        return read_state(run, alive=False)
    scheduler = open_scheduler(submission.scheduler)
    try:
        alive = scheduler.is_alive(run, submission)
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
    if verdict is not None and read_json(run.files.verdict) != (recorded := _plain(verdict)):
        with contextlib.suppress(OSError):
            write_json(run.files.verdict, recorded)
    return verdict


def as_data(run: Run, state: State, verdict: Verdict | None = None) -> dict[str, Any]:
    """A run as --json shows it."""
    fields = asdict(state)
    return {
        "run": run.id,
        "run_dir": str(run.files.root),
        "state": fields.pop("name"),
        **fields,
        "verdict": _plain(verdict) if verdict else None,
    }


def _plain(verdict: Verdict) -> dict[str, Any]:
    """As JSON gives it back: lists, no tuples."""
    return {**asdict(verdict), "evidence": [asdict(item) for item in verdict.evidence]}
