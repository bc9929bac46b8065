"""Options that several verbs share."""

from __future__ import annotations

from pathlib import Path

import click

runs_dir = click.option(
    "--runs-dir",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("runs"),
    envvar="CPM_RUNS_DIR",
    show_default=True,
    show_envvar=True,
    help="Folder of run directories; on a cluster, one that all nodes share.",
)
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
run_name = click.argument("run", required=False, metavar="[RUN]")
