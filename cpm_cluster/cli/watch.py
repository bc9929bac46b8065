"""The state of a run as the verbs need it: records, the scheduler's word, and the verdict once it has ended."""

from __future__ import annotations

from dataclasses import asdict

from cpm_cluster.diagnosis.diagnose import diagnose
from cpm_cluster.diagnosis.verdict import Verdict
from cpm_cluster.runs.records import write_json
from cpm_cluster.runs.run import Run, read_submission
from cpm_cluster.runs.state import State, read_state
from cpm_cluster.schedulers import open_scheduler


def current_state(run: Run) -> State:
    """What has become of a run; raises SchedulerError where only another machine knows."""
    submission = read_submission(run)
    alive = submission is not None and open_scheduler(submission.scheduler).is_alive(run, submission)
    return read_state(run, alive)


def settle(run: Run, state: State) -> Verdict | None:
    """The verdict on a run that has ended, recorded in it."""
    verdict = diagnose(run, state)
    if verdict is not None:
        write_json(run.files.verdict, asdict(verdict))
    return verdict
