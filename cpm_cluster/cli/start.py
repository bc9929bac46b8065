"""Handing a run to its scheduler, which Ctrl-C must not tear, and following it."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable

import click

from cpm_cluster.cli import exit_codes
from cpm_cluster.cli.follow import follow, is_terminal, what_next
from cpm_cluster.runs.run import Run
from cpm_cluster.schedulers import Scheduler


def start(run: Run, scheduler: Scheduler, detach: bool, as_json: bool) -> int:
    """Start an attempt; the exit code is the run's own, or that of a detached start."""
    interrupted = _whole(lambda: scheduler.submit(run))
    if not detach:
        return follow(run, as_json, ask_at_once=interrupted)
    click.echo(json.dumps({"run": run.id, "run_dir": str(run.files.root)}) if as_json else run.id)
    if is_terminal(sys.stdout) and not as_json:
        click.echo(what_next(run))
    return exit_codes.OK


def _whole(act: Callable[[], object]) -> bool:
    """Do something from beginning to end; whether there was a Ctrl-C meanwhile."""
    pressed = []
    before = signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
    try:
        act()
    finally:
        signal.signal(signal.SIGINT, before)
    return bool(pressed)
