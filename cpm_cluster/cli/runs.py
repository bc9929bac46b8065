"""cpm runs: list runs."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import click

from cpm_cluster.cli import exit_codes, options
from cpm_cluster.cli.progress_line import progress_line
from cpm_cluster.monitoring.run_state import Look, as_data, current_state, settle
from cpm_cluster.runs.run import Run, RunError, all_runs, run_folders
from cpm_cluster.runs.state import State
from cpm_cluster.schedulers import SchedulerError


@click.command(
    "runs",
    epilog="\b\nExamples:\n  cpm runs\n  cpm runs --json | jq -r '.[] | select(.state == \"failed\") | .run'",
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option("--limit", type=click.IntRange(1), default=20, show_default=True, help="At most so many, newest first.")
@options.runs_dir
@options.as_json
def command(limit: int, runs_dir: Path, as_json: bool) -> int:
    """List runs, the newest first."""
    look = Look()
    rows = [(run, _state(run, look)) for run in islice(all_runs(runs_dir), limit)]
    if as_json:
        data = [_as_data(run, state) for run, state in rows]
        click.echo(json.dumps(data, indent=1, ensure_ascii=False))
        return exit_codes.OK
    width = max((len(run.id) for run, _ in rows), default=0)
    for run, state in rows:
        click.echo(f"{run.id:<{width}}  {_described(run, state)}".rstrip())
    if not rows:
        click.echo(_nothing_in(runs_dir), err=True)
    return exit_codes.OK


def _nothing_in(runs_dir: Path) -> str:
    if unread := run_folders(runs_dir):
        return f"none of the {len(unread)} runs in {runs_dir} can be read; cpm status {unread[0].name} says why"
    return f"no runs in {runs_dir}; cpm-submit JOB makes one, --runs-dir looks elsewhere"


def _state(run: Run, look: Look) -> State | str:
    """A run that only another machine knows about, or a damaged one, must not hide the others: its state says why."""
    try:
        return current_state(run, look)
    except (RunError, SchedulerError) as error:
        return str(error)


def _as_data(run: Run, state: State | str) -> dict[str, Any]:
    if isinstance(state, State):
        return as_data(run, state, settle(run, state))
    return {"run": run.id, "run_dir": str(run.files.root), "state": "unknown", "why": state}


def _described(run: Run, state: State | str) -> str:
    if isinstance(state, str):
        return f"unknown    {state}"
    verdict = settle(run, state)
    why = f"({verdict.category})" if verdict and verdict.category != state.name else ""
    progress = progress_line(state.progress) if state.progress else ""
    return f"{state.name:<9}  {' '.join(filter(None, (progress, why)))}"
