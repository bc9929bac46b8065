"""cpm sandbox: a real Slurm cluster on this one machine."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from cpm_cluster.cli import exit_codes, options
from cpm_cluster.sandbox.state import DEFAULT_ROOT, Part, Sandbox

CONTEXT = {"help_option_names": ["-h", "--help"]}

USE = """\
to use it, as any user of this machine:
  export SLURM_CONF={slurm_conf}
  cpm-submit jobs/quickstart.yaml --set cluster=sandbox --runs-dir {shared}/$USER"""


def root(function: Callable[..., Any]) -> Callable[..., Any]:
    """The option --root, given on as a Sandbox."""
    option = click.option(
        "--root",
        "state",
        type=click.Path(path_type=Path),
        default=DEFAULT_ROOT,
        envvar="CPM_SANDBOX_ROOT",
        show_default=True,
        show_envvar=True,
        callback=lambda ctx, parameter, value: Sandbox(root=value),
        help="Folder of everything that belongs to it; not on a network file system.",
    )
    return option(function)


@click.group("sandbox", context_settings=CONTEXT)
def command() -> None:
    """A real Slurm cluster of eight nodes on this one machine: to try, to learn, to rehearse.

    \b
    sudo cpm sandbox up --install   bring it up, with Debian's packages
    cpm sandbox status              what runs
    sudo cpm sandbox down           remove it
    """


@command.command(
    "up",
    epilog="\b\nExamples:\n  sudo cpm sandbox up --install             with Debian's packages\n"
    "  sudo cpm sandbox up --without-containers  Slurm alone, in seconds",
    context_settings=CONTEXT,
)
@click.option("--install", is_flag=True, help="Install missing packages with apt-get.")
@click.option("--without-containers", is_flag=True, help="Slurm alone: no dockerd, no image.")
@root
def up(state: Sandbox, install: bool, without_containers: bool) -> int:
    """Bring the cluster up; what runs already goes on, what has died is started again. Needs root."""
    from cpm_cluster.sandbox import sandbox

    sandbox.up(state, install=install, with_containers=not without_containers)
    click.echo(USE.format(slurm_conf=state.slurm_conf, shared=state.shared))
    return exit_codes.OK


@command.command(
    "down",
    epilog="\b\nExamples:\n  sudo cpm sandbox down               remove it\n"
    "  sudo cpm sandbox down --keep-files  `up` goes on with its runs and its image",
    context_settings=CONTEXT,
)
@click.option("--keep-files", is_flag=True, help="Keep the folder: runs, accounting, image; `up` goes on with them.")
@click.option("--purge", is_flag=True, help="Remove the user account cpm-sandbox, too.")
@root
def down(state: Sandbox, keep_files: bool, purge: bool) -> int:
    """End and remove everything but the installed packages: jobs, daemons, and the folder with the runs in it.

    Needs root.
    """
    from cpm_cluster.sandbox import sandbox

    sandbox.down(state, keep_files=keep_files, purge=purge)
    return exit_codes.OK


@command.command(
    "status",
    epilog="\b\nExamples:\n  cpm sandbox status         daemons, nodes, partitions\n"
    "  cpm sandbox status --json  the same for programs",
    context_settings=CONTEXT,
)
@root
@options.as_json
def status(state: Sandbox, as_json: bool) -> int:
    """Show daemons, nodes, partitions; exit code 3 unless all nodes can run jobs."""
    from cpm_cluster.sandbox import sandbox

    found = sandbox.status(state)
    if as_json:
        click.echo(json.dumps({**asdict(found), "up": found.is_up}, indent=1))
    else:
        _print_parts("daemons", found.daemons)
        click.echo("nodes")
        for node in found.nodes:
            cut = "link is cut" if node.state != "unknown" and not node.link_up else ""
            click.echo(f"  {node.name:<18} {node.state:<12} {node.address:<12} {cut}".rstrip())
        click.echo("partitions")
        for partition in found.partitions:
            click.echo(f"  {partition.name:<18} {partition.nodes}  up to {partition.time_limit}")
        _print_parts("containers", found.containers)
    return exit_codes.OK if found.is_up else exit_codes.UNAVAILABLE


def _print_parts(title: str, parts: tuple[Part, ...]) -> None:
    click.echo(title)
    for part in parts:
        click.echo(f"  {part.name:<18} {'up' if part.up else 'down':<12} {part.detail}".rstrip())
