"""The command line: one module a verb, imported when it is used."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any

import click

import cpm_cluster
from cpm_cluster.cli import exit_codes

VERBS = {
    "submit": "submit a job file, and follow it",
    "plan": "whether a job fits, how long it takes, what it costs",
    "calibrate": "short runs that make plans fit your own GPUs",
    "status": "what has become of a run",
    "logs": "what a run printed",
    "cancel": "end a run",
    "resume": "go on from a run's newest checkpoint",
    "runs": "list runs",
    "export": "a run's weights for other programs",
    "shell": "a shell on a node, inside the image",
    "sandbox": "a Slurm cluster on this one machine",
    "schema": "JSON Schema of what people write",
}


class Verbs(click.Group):
    """Verbs by name, so that --help and a verb import only what they need."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command:
        if cmd_name not in VERBS:
            raise click.UsageError(_no_verb(cmd_name), ctx)
        command: click.Command = import_module(f"cpm_cluster.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))


def _no_verb(word: str) -> str:
    from cpm_cluster.specs.problems import did_you_mean, quoted

    if word.endswith((".yaml", ".yml")):
        return f"{quoted(word)} is no verb; to run that job: cpm submit {word}"
    return f"{quoted(word)} is no verb{did_you_mean(word, VERBS)}"


@click.group(cls=Verbs, epilog=exit_codes.EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(cpm_cluster.__version__, prog_name="cpm")
def cli() -> None:
    """Launch, follow and explain training runs of language models, on Slurm and on this machine.

    \b
    cpm submit jobs/quickstart.yaml            train a small model here
    cpm submit jobs/lora_100b.yaml --dry-run   see what a cluster would run
    cpm plan jobs/lora_100b.yaml               whether it fits, how long it takes, what it costs
    cpm status                                 the newest run
    cpm VERB --help                            what a verb does, with examples
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """`cpm`."""
    _run(cli, arguments)


def submit_main(arguments: Sequence[str] | None = None) -> None:
    """`cpm-submit`."""
    _run(import_module("cpm_cluster.cli.submit").command, arguments)


def _run(command: click.Command, arguments: Sequence[str] | None) -> None:
    words = list(sys.argv[1:] if arguments is None else arguments) or (["--help"] if command is cli else [])
    stdout = sys.stdout
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that is not UTF-8 has no bar for the loss curve
    try:
        code = command.main(words, standalone_mode=False)
    except click.exceptions.Abort:
        code = exit_codes.INTERRUPTED
    except click.ClickException as error:
        code = _report_usage(error, "--json" in words)
    except KeyboardInterrupt:
        code = exit_codes.INTERRUPTED
    except SystemExit as error:
        # when the reader (head, less) has gone, click replaces stdout, and click and rich end with 1: no failure
        has_gone = sys.stdout is not stdout or isinstance(error.__context__, BrokenPipeError)
        code = exit_codes.OK if has_gone else error.code
    except Exception as error:  # noqa: BLE001 - the one place that turns any failure into a sentence and a code
        code = _report(error, "--json" in words)
    sys.exit(code if isinstance(code, int) else exit_codes.OK)


def _report_usage(error: click.ClickException, as_json: bool) -> int:
    """Say what is wrong with the command line."""
    context = error.ctx if isinstance(error, click.UsageError) else None
    text = re.sub(r"\s*\n\s*", " ", error.format_message())  # click lists choices one a line, after a tab
    if as_json:
        _echo_json(text)
    else:
        hint = f"\n  {context.command_path} --help shows what there is" if context else ""
        _echo_error(f"error: {text}{hint}")
    return exit_codes.BAD_INPUT


def _report(error: Exception, as_json: bool) -> int:
    """Say what is wrong, without a traceback, and return the exit code."""
    for known, code, details in _known_errors():
        if isinstance(error, known):
            text = _os_error(error) if isinstance(error, OSError) else str(error)
            if as_json:
                _echo_json(text, **details(error))
            else:
                _echo_error(f"error: {text}" if "\n" not in text else text)
            return code
    return _report_defect(error)


def _echo_json(text: str, **details: Any) -> None:
    try:
        click.echo(json.dumps({"error": text, **details}, ensure_ascii=False, indent=1))
    except OSError:  # it may be why there is an error at all
        _echo_error(f"error: {text}")


def _echo_error(text: str) -> None:
    from cpm_cluster.specs.problems import printable

    with suppress(OSError):  # the exit code tells as well
        click.echo("\n".join(map(printable, text.splitlines())), err=True)


def _os_error(error: OSError) -> str:
    """`path: No space left on device`, not `[Errno 28] …`."""
    if error.errno == errno.ENOENT and not error.filename:  # so says getcwd(3)
        return "the folder that you are in has been removed; cd to one that is there"
    return f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error)


def _report_defect(error: Exception) -> int:
    """Our own fault: keep the traceback for a report, and say where."""
    import tempfile
    import traceback

    place = "this, for there is no folder to keep more in"
    with suppress(OSError):
        descriptor, place = tempfile.mkstemp(prefix="cpm-defect-", suffix=".txt")
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            traceback.print_exception(error, file=file)
    _echo_error(f"error: this is a defect of cpm-cluster ({type(error).__name__}); please report {place}")
    return exit_codes.FAILED


def _known_errors() -> list[tuple[type[Exception], int, Callable[[Any], dict[str, Any]]]]:
    from cpm_cluster.runs.run import RunError
    from cpm_cluster.runs.snapshot import SnapshotError
    from cpm_cluster.sandbox.state import SandboxError
    from cpm_cluster.schedulers import SchedulerError
    from cpm_cluster.specs.problems import SpecError

    return [
        (SpecError, exit_codes.BAD_INPUT, _problems),
        (RunError, exit_codes.BAD_INPUT, lambda error: {}),
        (SnapshotError, exit_codes.BAD_INPUT, lambda error: {}),
        (SchedulerError, exit_codes.UNAVAILABLE, lambda error: {}),
        (SandboxError, exit_codes.UNAVAILABLE, lambda error: {}),
        (OSError, exit_codes.UNAVAILABLE, lambda error: {}),
    ]


def _problems(error: Any) -> dict[str, Any]:
    return {
        "problems": [
            {"file": p.where.file, "line": p.where.line, "column": p.where.column, "key": p.key, "what": p.what}
            for p in error.problems
        ]
    }
