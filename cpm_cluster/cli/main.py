"""The command line: one module a verb, imported when it is used."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import click

import cpm_cluster
from cpm_cluster.cli import exit_codes

VERBS = {
    "submit": "submit a job file, and follow it",
    "status": "what has become of a run",
    "logs": "what a run printed",
    "cancel": "end a run",
    "resume": "go on from a run's newest checkpoint",
    "runs": "list runs",
    "schema": "JSON Schema of what people write",
}


class Verbs(click.Group):
    """Verbs by name, so that --help and a verb import only what they need."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        command: click.Command = import_module(f"cpm_cluster.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(cpm_cluster.__version__, prog_name="cpm")
def cli() -> None:
    """Launch, follow and explain training runs of language models, on Slurm and on this machine.

    \b
    cpm submit jobs/quickstart.yaml            train a small model here
    cpm submit jobs/lora_100b.yaml --dry-run   see what a cluster would run
    cpm status                                 the newest run
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """`cpm`."""
    _run(cli, arguments)


def submit_main(arguments: Sequence[str] | None = None) -> None:
    """`cpm-submit`."""
    _run(import_module("cpm_cluster.cli.submit").command, arguments)


def _run(command: click.Command, arguments: Sequence[str] | None) -> None:
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = command.main(words, standalone_mode=False)
    except click.exceptions.Abort:
        code = exit_codes.INTERRUPTED
    except click.ClickException as error:
        error.show()
        code = exit_codes.BAD_INPUT
    except KeyboardInterrupt:
        code = exit_codes.INTERRUPTED
    except BrokenPipeError:
        # the reader (head, less) has gone; Python would complain about stdout once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = exit_codes.OK
    except Exception as error:  # noqa: BLE001 - the one place that turns any failure into a sentence and a code
        code = _report(error, "--json" in words)
    sys.exit(code if isinstance(code, int) else exit_codes.OK)


def _report(error: Exception, as_json: bool) -> int:
    """Say what is wrong, without a traceback, and return the exit code."""
    for known, code, details in _known_errors():
        if isinstance(error, known):
            if as_json:
                click.echo(json.dumps({"error": str(error), **details(error)}, ensure_ascii=False, indent=1))
            else:
                click.echo(f"error: {error}" if "\n" not in str(error) else str(error), err=True)
            return code
    return _report_defect(error)


def _report_defect(error: Exception) -> int:
    """Our own fault: keep the traceback for a report, and say where."""
    import tempfile
    import traceback

    descriptor, path = tempfile.mkstemp(prefix="cpm-defect-", suffix=".txt")
    with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
        traceback.print_exception(error, file=file)
    click.echo(f"error: this is a defect of cpm-cluster ({type(error).__name__}); please report {path}", err=True)
    return exit_codes.FAILED


def _known_errors() -> list[tuple[type[Exception], int, Callable[[Any], dict[str, Any]]]]:
    from cpm_cluster.runs.run import RunError
    from cpm_cluster.runs.snapshot import SnapshotError
    from cpm_cluster.schedulers import SchedulerError
    from cpm_cluster.specs.problems import SpecError

    return [
        (SpecError, exit_codes.BAD_INPUT, _problems),
        (RunError, exit_codes.BAD_INPUT, lambda error: {}),
        (SnapshotError, exit_codes.BAD_INPUT, lambda error: {}),
        (SchedulerError, exit_codes.UNAVAILABLE, lambda error: {}),
        (OSError, exit_codes.UNAVAILABLE, lambda error: {}),
    ]


def _problems(error: Any) -> dict[str, Any]:
    return {
        "problems": [
            {"file": p.where.file, "line": p.where.line, "column": p.where.column, "key": p.key, "what": p.what}
            for p in error.problems
        ]
    }
