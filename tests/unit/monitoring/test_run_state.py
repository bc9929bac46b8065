"""The state of a run: its records, the scheduler's word, and the verdict."""

from __future__ import annotations

import json
import os

import pytest

from cpm_cluster.monitoring import run_state
from cpm_cluster.monitoring.run_state import as_data, current_state, settle
from cpm_cluster.runs.job_end import JobEnd
from cpm_cluster.runs.run import Submission, write_submission
from cpm_cluster.runs.state import read_state
from cpm_cluster.schedulers import SchedulerError


def test_a_run_as_json(made_run):
    made = made_run().submitted().phase("training").exited(1)
    state = read_state(made.run, alive=False)
    data = as_data(made.run, state, settle(made.run, state))
    assert list(data) == ["run", "run_dir", "state", "phase", "attempt", "exit_code", "progress", "endings", "verdict"]
    assert (data["state"], data["exit_code"], data["verdict"]["category"]) == ("failed", 1, "program")
    assert json.loads(json.dumps(data)) == data
    assert json.loads(made.run.files.verdict.read_text()) == data["verdict"]


@pytest.fixture
def elsewhere(made_run):
    """A local run that another machine started, in a folder that both share."""
    made = made_run()
    write_submission(made.run, Submission("local", "1", "another-host"))
    return made.phase("training")


def test_a_run_that_only_another_machine_knows_about(elsewhere):
    with pytest.raises(SchedulerError, match="was started on another-host; ask there"):
        current_state(elsewhere.run)


def test_the_recorded_end_of_a_run_on_another_machine_is_known_everywhere(elsewhere):
    assert current_state(elsewhere.exited(7).run).name == "failed"


@pytest.fixture
def scheduler_says(monkeypatch):
    """A scheduler that says once how a job ended, and has forgotten it then."""
    said = []

    class Scheduler:
        def ended_as(self, run, submission):
            return said.pop() if said else None

    monkeypatch.setattr(run_state, "open_scheduler", lambda name: Scheduler())
    return lambda state, by="": said.insert(0, JobEnd("1", state, "squeue --jobs=1", f"{state} g2001", "", by))


def test_the_schedulers_word_on_a_lost_run_is_kept_when_it_has_forgotten(made_run, scheduler_says):
    scheduler_says("TIMEOUT")
    made = made_run().submitted().phase("training")
    state = read_state(made.run, alive=False)
    first, later = settle(made.run, state), settle(made.run, state)
    assert first.cause == "Slurm ended it at its time limit." and first == later
    assert json.loads(made.run.files.verdict.read_text())["category"] == "time limit"


def test_who_cancelled_a_job_is_told_as_soon_as_accounting_knows(made_run, scheduler_says):
    """squeue knows first, and not by whom; a scheduler that has forgotten the job takes nothing away."""
    scheduler_says("CANCELLED")
    scheduler_says("CANCELLED", by="ann")
    made = made_run().submitted().phase("training").exited(143, stopped_by="SIGTERM")
    state = read_state(made.run, alive=False)
    causes = [settle(made.run, state).cause for _ in range(3)]
    told = "It was cancelled in Slurm by ann, not by cpm cancel."
    assert causes == ["It was cancelled in Slurm, not by cpm cancel.", told, told]


def test_accounting_is_not_asked_for_ever_who_cancelled_a_job(made_run, scheduler_says):
    scheduler_says("CANCELLED")
    made = made_run().submitted().phase("training").exited(143, stopped_by="SIGTERM")
    first = settle(made.run, read_state(made.run, alive=False))
    os.utime(made.run.files.verdict, (0, 0))
    scheduler_says("CANCELLED", by="ann")
    assert settle(made.run, read_state(made.run, alive=False)) == first


def test_it_is_of_no_other_attempt(made_run, scheduler_says):
    scheduler_says("TIMEOUT")
    made = made_run().submitted().phase("training")
    settle(made.run, read_state(made.run, alive=False))
    made.submitted(attempt=2).phase("training", attempt=2)
    assert settle(made.run, read_state(made.run, alive=False)).category == "lost"


def test_a_run_that_says_itself_why_it_ended_needs_no_scheduler(made_run, scheduler_says):
    scheduler_says("CANCELLED")
    made = made_run().submitted().phase("training").rank_error(0, time=1).exited(1)
    assert settle(made.run, read_state(made.run, alive=False)).category == "program"


def test_a_lost_run_that_nobody_submitted_has_no_scheduler_to_ask(made_run, scheduler_says):
    made = made_run().phase("training").exited(143, stopped_by="SIGTERM")
    assert settle(made.run, read_state(made.run, alive=False)).category == "terminated"
