"""cpm resume: go on from a run's newest checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import click

from cpm_cluster.cli import exit_codes, options
from cpm_cluster.cli.follow import follow
from cpm_cluster.cli.watch import current_state
from cpm_cluster.runs.run import RunError, find_run, write_submission
from cpm_cluster.schedulers import open_scheduler


@click.command(
    "resume",
    epilog="\b\nExample:\n  cpm resume            the newest run goes on",
    context_settings={"help_option_names": ["-h", "--help"]},
)
@options.run_name
@click.option("--detach", is_flag=True, help="Return at once instead of following the run.")
@options.runs_dir
@options.as_json
def command(run: str | None, detach: bool, runs_dir: Path, as_json: bool) -> int:
    """Start another attempt of RUN (default: the newest), which goes on from its newest whole checkpoint."""
    found = find_run(runs_dir, run)
    state = current_state(found)
    if not state.ended or state.name == "finished":
        raise RunError(f"{found.id} is {state.name}; only a run that ended early can go on")
    scheduler = open_scheduler(found.plan.scheduler)
    scheduler.require()
    for stale in (found.files.cancel_request, found.files.verdict):
        stale.unlink(missing_ok=True)
    write_submission(found, scheduler.submit(found))
    if not detach:
        return follow(found, as_json)
    click.echo(json.dumps({"run": found.id}) if as_json else found.id)
    return exit_codes.OK
