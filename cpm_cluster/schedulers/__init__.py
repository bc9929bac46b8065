"""Schedulers, one module each, named as the cluster file names them; each has a class `Scheduler`."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Protocol

from cpm_cluster.launch.plan import LaunchPlan
from cpm_cluster.runs.job_end import JobEnd
from cpm_cluster.runs.run import Run, Submission


class SchedulerError(Exception):
    """The scheduler is not there, or refuses; the message says why and what to do."""


# Whether the scheduler still holds a job, waiting or running.
IsAlive = Callable[[Run, Submission], bool]


class Scheduler(Protocol):
    """What submits, watches and cancels runs."""

    def require(self, plan: LaunchPlan) -> str:
        """Raise SchedulerError where this machine cannot submit such a plan, RunError where a file of it is missing.

        Returns when the scheduler expects to start it, as a sentence; empty where nothing waits.
        """

    def submit(self, run: Run) -> Submission:
        """Hand a run over, and record that in it; raises SchedulerError when it is refused."""

    def is_alive(self, run: Run, submission: Submission) -> bool:
        """Whether the scheduler still holds the job, waiting or running."""

    def look(self) -> IsAlive:
        """As `is_alive` now, for any number of runs at the price of one."""

    def ended_as(self, run: Run, submission: Submission) -> JobEnd | None:
        """How the scheduler says that the newest incarnation of the job ended; None while it goes on, or not known."""

    def waiting_for(self, run: Run, submission: Submission) -> str:
        """Why a job has not started yet, in the scheduler's words; empty when it does not wait."""

    def warn(self, run: Run, submission: Submission) -> None:
        """Ask a running job to save and stop, as before its time limit (SIGUSR2)."""

    def cancel(self, run: Run, submission: Submission) -> None:
        """End the job and everything it started; returns when that is done."""


def open_scheduler(name: str) -> Scheduler:
    """The scheduler that a cluster file names."""
    scheduler: Scheduler = import_module(f"{__name__}.{name}").Scheduler()
    return scheduler
