"""cpm shell: an allocation, and a shell inside the image."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from cpm_cluster.cli import exit_codes, here
from cpm_cluster.launch.sbatch import by_hand
from cpm_cluster.launch.shell import named, read_shell_job, shell_plan

EPILOG = (
    """\
\b
Examples:
  cpm shell lora-100b-8x80g --cluster nine-g            eight GPUs for an hour
  cpm shell lora-100b-8x80g --set resources.gpus_per_node=1 --time 20m
  cpm shell jobs/lora_100b.yaml                         what a job will see: image, mounts, environment
  cpm shell lora-100b-8x80g --cluster nine-g --dry-run  the lines to type by hand

"""
    + exit_codes.EPILOG
)


@click.command("shell", epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("profile")
@click.option("--cluster", metavar="NAME", help="The cluster; left out: the job's, else detected.")
@click.option("--image", metavar="NAME", help="The container image; left out: the job's, else cpmlive-flash:0.0.4.")
@click.option("--time", metavar="TIME", default="1h", show_default=True, help="How long the nodes are yours.")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a key of the job: slurm.nodelist=g2003."
)
@click.option("--dry-run", is_flag=True, help="Print the lines to type by hand, and touch nothing.")
def command(
    profile: str, cluster: str | None, image: str | None, time: str, overrides: tuple[str, ...], dry_run: bool
) -> int:
    """Open a shell on one node, with the resources of PROFILE, inside the image.

    PROFILE is a resource profile (configs/profiles), or a job file, whose image, mounts and environment the shell has.
    The current folder is there under the same path. The exit code is the shell's.
    """
    from cpm_cluster.runs.run import new_run_id

    if not profile:  # what an unset variable of a script comes to
        raise click.UsageError("the name of the profile is empty; configs/profiles has some, a job file does as well")
    asked = {"--cluster": cluster, "--image": image, "--time": time}
    given = {option: text for option, text in asked.items() if text is not None}
    catalogue = here.catalogue()
    spec = read_shell_job(profile, here.job_named(profile), given, overrides, catalogue, here.has_slurm())
    plan = shell_plan(spec, new_run_id(named(spec)), Path.cwd(), here.submitter())
    for warning in plan.warnings:
        click.echo(f"warning: {warning}", err=True)
    if dry_run:
        click.echo("\n".join(by_hand(plan)))
        return exit_codes.OK
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise click.UsageError("a shell needs a terminal; for a program, submit a job with engine: command")

    from cpm_cluster.schedulers import open_scheduler
    from cpm_cluster.schedulers.interactive import hold_shell

    expected = open_scheduler(plan.scheduler).require(plan)
    if expected:
        click.echo(f"cpm: {expected}", err=True)
    return hold_shell(plan)
