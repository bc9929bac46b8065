"""cpm logs: what a run printed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import click

from cpm_cluster.cli import exit_codes, options
from cpm_cluster.cli.watch import current_state
from cpm_cluster.runs.run import Run, RunError, find_run

POLL_S = 0.3


@click.command(
    "logs",
    epilog="\b\nExamples:\n  cpm logs -f                    rank 0 of the newest run, as it is written\n"
    "  cpm logs RUN --rank 3\n  cpm logs RUN --launcher        the launcher's own messages",
    context_settings={"help_option_names": ["-h", "--help"]},
)
@options.run_name
@click.option("-f", "--follow", "following", is_flag=True, help="Go on until the run ends.")
@click.option("--rank", type=click.IntRange(0), default=0, show_default=True, help="Whose output.")
@click.option("--launcher", is_flag=True, help="The output of the launcher (torchrun, docker) of each node instead.")
@click.option("--attempt", type=click.IntRange(1), help="Default: the newest.")
@options.runs_dir
def command(run: str | None, following: bool, rank: int, launcher: bool, attempt: int | None, runs_dir: Path) -> int:
    """Print what a rank of RUN (default: the newest) wrote to stdout and stderr."""
    found = find_run(runs_dir, run)
    name = "node.log" if launcher or found.plan.trainer is None else f"rank-{rank}.log"
    pieces = _followed(found, name, attempt) if following else _whole(found, name, attempt)
    for piece in pieces:
        click.echo(piece, nl=False)
    return exit_codes.OK


def log_files(run: Run, name: str, attempt: int | None) -> list[Path]:
    """A log of every node that has it, of one attempt."""
    attempts = sorted(int(path.name[8:]) for path in run.files.root.glob("attempt-*") if path.name[8:].isdigit())
    if not attempts:
        return []
    folder = run.files.root / f"attempt-{attempt or attempts[-1]}"
    return sorted(folder.glob(f"node-*/{name}"))


def _whole(run: Run, name: str, attempt: int | None) -> Iterator[bytes]:
    files = log_files(run, name, attempt)
    if not files:
        raise RunError(f"{run.id} has no {name} (attempt {attempt or 'newest'}); it may not have started yet: add -f")
    for path in files:
        yield path.read_bytes()


def _followed(run: Run, name: str, attempt: int | None) -> Iterator[bytes]:
    read: dict[Path, int] = {}
    while True:
        ended = current_state(run).ended
        for path in log_files(run, name, attempt):
            with open(path, "rb") as file:
                file.seek(read.get(path, 0))
                piece = file.read()
            read[path] = read.get(path, 0) + len(piece)
            yield piece
        if ended:
            return
        time.sleep(POLL_S)
