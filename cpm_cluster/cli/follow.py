"""Following a run: a live display on a terminal, lines elsewhere; Ctrl-C asks once, and cancels the second time."""

from __future__ import annotations

import json
import sys
import time
from typing import Protocol, TextIO

import click

from cpm_cluster.cli import exit_codes
from cpm_cluster.cli.cancel import announcement, cancel_run
from cpm_cluster.cli.progress_line import progress_line
from cpm_cluster.cli.summary import summary
from cpm_cluster.monitoring.run_state import as_data, current_state, settle
from cpm_cluster.runs.run import Run
from cpm_cluster.runs.state import State

POLL_S = 0.5
SECONDS_BETWEEN_LINES = 5.0
# What alternates while a run trains is no news.
TRAINING = ("training", "saving", "evaluating")


class View(Protocol):
    """What shows a state, again and again."""

    def show(self, state: State) -> None:
        """Bring the display up to date."""

    def pause(self) -> None:
        """Leave the terminal to a question."""


def follow(run: Run, as_json: bool, ask_at_once: bool = False) -> int:
    """Watch a run until it ends, or until the user leaves it; the exit code is the run's own.

    `ask_at_once` is for a Ctrl-C that came while the run was started.
    """
    view = open_view(run, as_json)
    try:
        state = _watch(run, view, ask_at_once)
    finally:
        view.pause()
    if not state.ended:
        click.echo(f"{run.id} goes on\n{what_next(run)}", err=as_json)
        return exit_codes.INTERRUPTED
    verdict = settle(run, state)
    if as_json:
        click.echo(json.dumps(as_data(run, state, verdict), indent=1, ensure_ascii=False))
    else:
        click.echo(summary(run, state, verdict))
    return _exit_code(state)


def what_next(run: Run) -> str:
    """What one can do about a run that goes on by itself."""
    return f"  follow it: cpm logs -f {run.id}\n  end it:    cpm cancel {run.id}"


def _exit_code(state: State) -> int:
    if state.name == "cancelled":
        return exit_codes.INTERRUPTED
    if state.name == "finished":
        return exit_codes.OK
    return state.exit_code or exit_codes.FAILED


def _watch(run: Run, view: View, ask: bool) -> State:
    while True:
        try:
            if ask:
                raise KeyboardInterrupt
            state = current_state(run)
            view.show(state)
            if state.ended:
                return state
            time.sleep(POLL_S)
        except KeyboardInterrupt:
            ask = False
            if _leave_it_running(view):
                return current_state(run)
            _cancel(run)


def _cancel(run: Run) -> None:
    """A further Ctrl-C does not wait for the end: what was asked for happens all the same."""
    try:
        click.echo("\n" + announcement(run), err=True)
        cancel_run(run)
    except KeyboardInterrupt:
        click.echo(f"it is being cancelled; cpm status {run.id} says when it has ended", err=True)
        raise


def _leave_it_running(view: View) -> bool:
    """The user's choice; a second Ctrl-C means cancel. Where nobody can answer it goes on."""
    try:
        view.pause()
        if not is_terminal(sys.stdin):
            return True
        click.echo("\nLeave it running, or cancel it (Ctrl-C again)? [leave] ", nl=False, err=True)
        return not sys.stdin.readline().strip().lower().startswith("c")
    except KeyboardInterrupt:
        return False


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a person is at its other end; a stream that the shell has closed is None."""
    return stream is not None and stream.isatty()


def open_view(run: Run, as_json: bool) -> View:
    """The view for what is at the other end of stdout."""
    if as_json:
        return _Nothing()
    if is_terminal(sys.stdout):
        from cpm_cluster.cli.live import LiveView

        return LiveView(run)
    return _Lines(run)


class _Nothing:
    def show(self, state: State) -> None:
        """JSON is printed at the end."""

    def pause(self) -> None:
        """There is no display."""


class _Lines:
    """A line when the phase changes, and every few seconds while training."""

    def __init__(self, run: Run) -> None:
        click.echo(f"{run.id}\n  {run.files.root}")
        self._shown = ("", -1)
        self._shown_at = 0.0

    def show(self, state: State) -> None:
        step = int((state.progress or {}).get("step", -1))
        now = time.monotonic()
        due = now - self._shown_at >= SECONDS_BETWEEN_LINES and step != self._shown[1]
        phase = TRAINING[0] if state.phase in TRAINING else state.phase
        if state.ended or not (phase != self._shown[0] or due):
            return
        self._shown, self._shown_at = (phase, step), now
        progress = progress_line(state.progress) if state.progress and step > 0 else ""
        click.echo(f"  {phase or state.name:<10} {progress}".rstrip())

    def pause(self) -> None:
        """Lines stay where they are."""
