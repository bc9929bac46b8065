"""cpm runs: list runs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from cpm_cluster.cli import exit_codes, options
from cpm_cluster.cli.progress_line import progress_line
from cpm_cluster.cli.watch import current_state
from cpm_cluster.runs.run import all_runs


@click.command(
    "runs",
    epilog="\b\nExamples:\n  cpm runs\n  cpm runs --json | jq -r '.[] | select(.name == \"failed\") | .run'",
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option("--limit", type=click.IntRange(1), default=20, show_default=True, help="At most so many, newest first.")
@options.runs_dir
@options.as_json
def command(limit: int, runs_dir: Path, as_json: bool) -> int:
    """List runs, the newest first."""
    rows = [(run, current_state(run)) for run, _ in zip(all_runs(runs_dir), range(limit), strict=False)]
    if as_json:
        data = [{"run": run.id, "run_dir": str(run.files.root), **asdict(state)} for run, state in rows]
        click.echo(json.dumps(data, indent=1, ensure_ascii=False))
        return exit_codes.OK
    width = max((len(run.id) for run, _ in rows), default=0)
    for run, state in rows:
        click.echo(
            f"{run.id:<{width}}  {state.name:<9}  {progress_line(state.progress) if state.progress else ''}".rstrip()
        )
    if not rows:
        click.echo(f"no runs in {runs_dir}", err=True)
    return exit_codes.OK
