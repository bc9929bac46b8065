"""cpm export: a run's weights for other programs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import click

from cpm_cluster.cli import exit_codes, options
from cpm_cluster.runs.run import Run, RunError, find_run

if TYPE_CHECKING:
    from cpm_cluster.training.export import Note

EPILOG = (
    """\
\b
Examples:
  cpm export --format hf                        the newest run, for transformers, vLLM and others
  cpm export RUN --format hf --merge            of a LoRA run: base and updates as one model
  cpm export RUN --format lora                  of a LoRA run: an adapter for PEFT, and CPM-9G's -delta.pt
  cpm export RUN --format cpm9g --dtype bf16 --output /models/mine
  cpm export RUN --format cpm9g --merge --adapter /models/their-lora --output /models/theirs

"""
    + exit_codes.EPILOG
)


@click.command("export", epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@options.run_name
@click.option(
    "--format",
    "layout",
    type=click.Choice(["hf", "cpm9g", "lora"]),
    required=True,
    help="Hugging Face's Llama layout, CPM-9G's .pt, or LoRA updates alone.",
)
@click.option("--output", type=click.Path(path_type=Path), help="The new folder.  [default: RUN/export/FORMAT]")
@click.option("--merge", is_flag=True, help="Fold LoRA updates into the base weights of the run's init_from.")
@click.option(
    "--adapter",
    type=click.Path(path_type=Path),
    help="LoRA updates from elsewhere instead of the run's: PEFT's folder, or a -delta.pt of CPM-9G.",
)
@click.option("--dtype", type=click.Choice(["bf16", "fp16", "fp32"]), help="Default: as the weights lie there.")
@click.option("--step", type=click.IntRange(1), help="Of that checkpoint. Default: the last weights, or checkpoint.")
@click.option("--force", is_flag=True, help="Replace an earlier export.")
@options.runs_dir
@options.as_json
def command(
    run: str | None,
    layout: str,
    output: Path | None,
    merge: bool,
    adapter: Path | None,
    dtype: str | None,
    step: int | None,
    force: bool,
    runs_dir: Path,
    as_json: bool,
) -> int:
    """Write the weights of RUN (default: the newest) so that other programs read them.

    A run that has not finished gives its newest checkpoint. Merged weights are compared with the trained model before
    the folder appears. It needs torch.
    """
    found = find_run(runs_dir, run)
    if found.plan.trainer is None:
        raise RunError(f"{found.id} is a program of your own (engine: command), whose weights cpm does not know")
    if find_spec("torch") is None:
        raise OSError("cpm export needs torch, which is not installed here: pip install 'cpm-cluster[train]'")
    from cpm_cluster.training.errors import UserError
    from cpm_cluster.training.export import Wanted, export

    folder = (output or found.files.root / "export" / layout).absolute()
    wanted = Wanted(found.files.root, layout, folder, merge, dtype, step, force, adapter)
    try:
        with _display(as_json) as note:
            record = export(wanted, lambda path: on_this_host(found, path), note)
    except UserError as error:
        raise RunError(str(error)) from error
    click.echo(json.dumps(record, indent=1, ensure_ascii=False) if as_json else _text(record))
    return exit_codes.OK


def on_this_host(run: Run, path: str) -> Path:
    """Where a path of the job file lies outside of the run's container."""
    inside = PurePosixPath(path)
    mounts = run.plan.container.mounts if run.plan.container else ()
    # As in the container, the innermost mount counts.
    for mount in sorted(mounts, key=lambda mount: len(PurePosixPath(mount.target).parts), reverse=True):
        if inside.is_relative_to(mount.target):
            return Path(mount.source, inside.relative_to(mount.target))
    return Path(path)


@contextmanager
def _display(silent: bool) -> Iterator[Note]:
    """A bar on a terminal, on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(bar_width=30), MofNCompleteColumn(), TimeElapsedColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=silent or not console.is_terminal) as progress:
        bar = progress.add_task("reading")

        def note(what: str, done: int, of: int) -> None:
            progress.update(bar, description=what, completed=done, total=of)

        yield note


def _text(record: dict[str, Any]) -> str:
    what = record["from"] if record["step"] is None else f"{record['run']} after {record['step']} steps"
    lines = [f"{what}, {record['format']} in {record['dtype']}: {record['folder']}"]
    if "logits" in record:
        largest, tolerance = record["logits"]["largest"], record["logits"]["tolerance"]
        lines.append(
            f"  merged: logits differ from the trained model's by up to {largest:.2g} ({tolerance:.2g} allowed)"
        )
    lines += [f"  warning: {warning}" for warning in record["warnings"]]
    return "\n".join(lines)
