"""cpm logs: what a run printed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import click

from cpm_cluster.cli import exit_codes, options
from cpm_cluster.monitoring.run_state import current_state
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
    """Print what a rank of RUN (default: the newest) wrote to stdout and stderr.

    A program of engine `command` has one log on each node, whatever the rank.
    """
    found = find_run(runs_dir, run)
    name = "node.log" if launcher or found.plan.trainer is None else f"rank-{rank}.log"
    pieces = _followed(found, name, attempt) if following else _whole(found, name, attempt)
    for piece in pieces:
        click.echo(piece, nl=False)
    return exit_codes.OK


def _attempts(run: Run) -> list[int]:
    return sorted(int(path.name[8:]) for path in run.files.root.glob("attempt-*") if path.name[8:].isdigit())


def log_files(run: Run, name: str, attempt: int | None) -> list[Path]:
    """The logs of that name of one attempt, by default the newest: one for each node that has it."""
    newest = _attempts(run)[-1:]
    folder = run.files.root / f"attempt-{attempt or (newest or [0])[0]}"
    return sorted(folder.glob(f"node-*/{name}"))


def _whole(run: Run, name: str, attempt: int | None) -> Iterator[bytes]:
    files = log_files(run, name, attempt)
    if not files:
        raise RunError(_without_log(run, name, attempt))
    for path in files:
        yield path.read_bytes()


def _without_log(run: Run, name: str, attempt: int | None) -> str:
    """Why there is nothing to print, and what there is."""
    attempts, there = _attempts(run), sorted({path.name for path in log_files(run, "*.log", attempt)})
    if not attempts:
        return f"{run.id} has not begun, so there is no log of it; -f waits for one"
    if attempt is not None and attempt not in attempts:
        return f"{run.id} has no attempt {attempt}, only {', '.join(map(str, attempts))}"
    which = f"attempt {attempt or attempts[-1]} of {run.id}"
    way = f"; cpm logs {run.id} --launcher prints it" if there == ["node.log"] else ""
    return f"{which} has no {name}, only {', '.join(there) or 'an empty folder'}{way}"


def _followed(run: Run, name: str, attempt: int | None) -> Iterator[bytes]:
    if current_state(run).name == "prepared":
        raise RunError(f"{run.id} was never submitted, so there is nothing to follow")
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
