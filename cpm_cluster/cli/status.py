"""cpm status: what has become of a run."""

from __future__ import annotations

import json
from pathlib import Path

import click

from cpm_cluster.cli import exit_codes, options
from cpm_cluster.cli.follow import follow
from cpm_cluster.cli.peaks_line import peaks_line
from cpm_cluster.cli.progress_line import progress_line
from cpm_cluster.diagnosis.hang import hang
from cpm_cluster.diagnosis.retry import read_endings
from cpm_cluster.monitoring.run_state import as_data, current_state, settle
from cpm_cluster.runs.records import read_events
from cpm_cluster.runs.run import find_run
from cpm_cluster.runs.telemetry import run_telemetry


@click.command(
    "status",
    epilog="\b\nExamples:\n  cpm status                   the newest run\n"
    "  cpm status quickstart-2026   by the beginning of its id\n"
    "  cpm status -f                follow it to its end, as cpm-submit does",
    context_settings={"help_option_names": ["-h", "--help"]},
)
@options.run_name
@click.option("-f", "--follow", "following", is_flag=True, help="Show its progress until it ends.")
@options.runs_dir
@options.as_json
def command(run: str | None, following: bool, runs_dir: Path, as_json: bool) -> int:
    """Say what has become of RUN (default: the newest), and why it ended."""
    found = find_run(runs_dir, run)
    if following:
        return follow(found, as_json)
    state = current_state(found)
    verdict = settle(found, state)
    if as_json:
        click.echo(json.dumps(as_data(found, state, verdict), indent=1, ensure_ascii=False))
        return exit_codes.OK
    code = "" if state.exit_code is None else f", exit code {state.exit_code}"
    phase = f", {state.phase}" if state.phase and not state.ended else ""
    attempt = f" (attempt {state.attempt})" if state.attempt else ""
    click.echo(f"{found.id}: {state.name}{phase}{code}{attempt}")
    for ending in read_endings(read_events(found.files.root / "events")):
        if ending.attempt < state.attempt or not state.ended:
            click.echo(f"  attempt {ending.attempt}: {ending.cause}")
    if state.progress:
        click.echo("  " + progress_line(state.progress))
    if not state.ended and (hung := hang(found, state)):
        click.echo(f"  it may hang: {hung}")
    telemetry = run_telemetry(found.files.root / "telemetry")
    if telemetry:
        click.echo("  " + peaks_line(telemetry))
    if verdict:
        click.echo(f"  {verdict}")
    click.echo(f"  {found.files.root}")
    return exit_codes.OK
