"""cpm resume: go on from a run's newest checkpoint."""

from __future__ import annotations

from pathlib import Path

import click

from cpm_cluster.cli import options
from cpm_cluster.cli.start import start
from cpm_cluster.monitoring.run_state import current_state
from cpm_cluster.runs.run import RunError, find_run
from cpm_cluster.schedulers import open_scheduler


@click.command(
    "resume",
    epilog="\b\nExamples:\n  cpm resume                   the newest run goes on\n"
    "  cpm resume quickstart-2026   by the beginning of its id",
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
    if state.name in ("queued", "running"):
        raise RunError(f"{found.id} is {state.name}; cpm logs -f {found.id} follows it")
    if state.name == "finished":
        raise RunError(f"{found.id} is finished; only a run that ended early can go on")
    scheduler = open_scheduler(found.plan.scheduler)
    scheduler.require(found.plan)
    for stale in (found.files.cancel_request, found.files.verdict):
        stale.unlink(missing_ok=True)
    return start(found, scheduler, detach, as_json)
