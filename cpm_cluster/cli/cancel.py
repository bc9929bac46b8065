"""cpm cancel: end a run."""

from __future__ import annotations

import json
import time
from pathlib import Path

import click

from cpm_cluster.cli import exit_codes, options
from cpm_cluster.monitoring.run_state import current_state, settle
from cpm_cluster.runs.records import append_event, write_json
from cpm_cluster.runs.run import Run, RunError, find_run, read_submission
from cpm_cluster.schedulers import SchedulerError, open_scheduler


@click.command(
    "cancel",
    epilog="\b\nExamples:\n  cpm cancel                   the newest run\n"
    "  cpm cancel quickstart-2026   by the beginning of its id",
    context_settings={"help_option_names": ["-h", "--help"]},
)
@options.run_name
@options.runs_dir
@options.as_json
def command(run: str | None, runs_dir: Path, as_json: bool) -> int:
    """End RUN (default: the newest).

    The trainer saves first, and any other program may end by itself, if that takes less than half a minute; a second
    cancel does not wait for that.
    """
    found = find_run(runs_dir, run)
    was = current_state(found)
    if not was.ended:
        if not as_json:
            click.echo(announcement(found), err=True)
        cancel_run(found)
    state = current_state(found)
    settle(found, state)
    if as_json:
        click.echo(json.dumps({"run": found.id, "state": state.name, "was": was.name}))
    else:
        click.echo(f"{found.id}: had ended before: {was.name}" if was.ended else f"{found.id}: {state.name}")
    return exit_codes.OK


def announcement(run: Run) -> str:
    """What the user waits for."""
    first = "the trainer saves first, which may take" if run.plan.trainer else "its program may take"
    return f"cancelling {run.id}: {first} half a minute"


def cancel_run(run: Run) -> None:
    """Record the wish, then have the scheduler fulfil it; raises RunError for a run that was never submitted."""
    submission = read_submission(run)
    if submission is None:
        raise RunError(f"{run.id} was never submitted by cpm-submit; end a job that runs its script with scancel")
    write_json(run.files.cancel_request, {"time": time.time()})
    append_event(run.files.events("submitter"), "cancel")
    try:
        open_scheduler(submission.scheduler).cancel(run, submission)
    except SchedulerError:  # it goes on, and however it ends later, that is not why
        run.files.cancel_request.unlink(missing_ok=True)
        raise
