"""cpm submit: what would run, and running it."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

import click

from cpm_cluster.cli import exit_codes, here, options
from cpm_cluster.launch.plan import LaunchPlan
from cpm_cluster.launch.prepare import Prepared, prepare, read_job
from cpm_cluster.launch.staging import read_staged, staged_rehearsal, variables

EPILOG = (
    """\
\b
Examples:
  cpm-submit jobs/quickstart.yaml                              train here, and follow
  cpm-submit jobs/lora_100b.yaml --dry-run                     what would run, nothing is touched
  cpm-submit jobs/lora_100b.yaml --export job.sbatch           a script for plain sbatch
  cpm-submit jobs/lora_100b.yaml --explain docker.shm-size     who set a value, and why
  cpm-submit jobs/lora_10b.yaml --set training.lr=2e-4 --set slurm.nodelist=g2003 --detach

"""
    + exit_codes.EPILOG
)


@click.command("submit", epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("job", type=click.Path(readable=False, path_type=Path))
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a key of the job: training.lr=1e-4."
)
@click.option("--dry-run", is_flag=True, help="Print what would run, and touch nothing.")
@click.option(
    "--export",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Prepare the run and write its script for plain sbatch, without submitting it.",
)
@click.option("--explain", metavar="KEY", help="Say who set a value, where and why; `all` lists everything.")
@click.option(
    "--rehearse",
    "rehearsing",
    is_flag=True,
    help="Run it with a tiny model: same nodes, ranks, container, mounts and script; stop it, and see it go on.",
)
@click.option("--force", is_flag=True, help="Submit a job that does not fit; the run's record says so.")
@click.option("--detach", is_flag=True, help="Return at once instead of following the run.")
@options.runs_dir
@options.as_json
def command(
    job: Path,
    overrides: tuple[str, ...],
    dry_run: bool,
    export: Path | None,
    explain: str | None,
    rehearsing: bool,
    force: bool,
    detach: bool,
    runs_dir: Path,
    as_json: bool,
) -> int:
    """Submit the job file JOB, and follow it until it ends."""
    if dry_run + (export is not None) + (explain is not None) + detach > 1:
        raise click.UsageError("--dry-run, --export, --explain and --detach exclude each other")
    if rehearsing and (export is not None or explain is not None or detach):
        raise click.UsageError("--rehearse goes with --dry-run alone: a rehearsal is watched to its end")
    job = here.job_file(job)
    if rehearsing:
        return _rehearse(job, overrides, runs_dir, as_json, dry_run)
    prepared = _prepare(job, overrides, runs_dir)
    if explain is not None:
        return _explain(prepared, explain, as_json)
    if dry_run:
        return _show(prepared, as_json)
    if not _may_go(prepared, force, as_json):
        return exit_codes.DOES_NOT_FIT
    return _export(prepared, job, export, as_json) if export else _submit(prepared, job, detach, as_json)


def _may_go(prepared: Prepared, force: bool, as_json: bool) -> bool:
    """Say what the planner found, and whether the job is submitted."""
    from cpm_cluster.cli.fit_text import headline, refusal

    fit = prepared.fit
    if fit.does_not_fit and not force:
        if as_json:
            from cpm_cluster.cli.dry_run import fit_data

            click.echo(json.dumps({"error": refusal(fit), **fit_data(fit)}, indent=1, ensure_ascii=False))
        else:
            click.echo(f"error: {refusal(fit)}", err=True)
        return False
    forced = [f"submitted nevertheless (--force): {text}" for text in fit.shortages()]
    for warning in (*prepared.plan.warnings, *forced, *(f"tight: {text}" for text in fit.shortages("tight"))):
        click.echo(f"warning: {warning}", err=True)
    if fit.told != "not judged":
        click.echo(headline(fit), err=True)
    return True


def _prepare(job: Path, overrides: tuple[str, ...], runs_dir: Path) -> Prepared:
    from cpm_cluster.calibration.from_runs import calibration_for
    from cpm_cluster.runs.run import new_run_id, run_directory

    spec = read_job(job, overrides, here.catalogue(), here.has_slurm())
    run_id = new_run_id(spec.name)
    return prepare(
        spec, run_id, run_directory(runs_dir, run_id), here.submitter(), calibration_for(spec, here.calibrations())
    )


def _rehearse(job: Path, overrides: tuple[str, ...], runs_dir: Path, as_json: bool, dry_run: bool) -> int:
    from cpm_cluster.cli.make_run import make_run
    from cpm_cluster.cli.rehearse import run_rehearsal
    from cpm_cluster.runs.run import new_run_id, run_directory
    from cpm_cluster.schedulers import open_scheduler

    surroundings = here.surroundings()
    os.environ.update(variables(surroundings))
    staged = read_staged(job, overrides, here.catalogue(), surroundings)
    run_id = new_run_id(staged.name)
    run_dir = run_directory(runs_dir, run_id)
    rehearsal = staged_rehearsal(staged, run_dir, os.path.exists)
    prepared = prepare(rehearsal.spec, run_id, run_dir, here.submitter())
    if dry_run:
        return _show(prepared, as_json)
    scheduler = open_scheduler(prepared.plan.scheduler)
    scheduler.require(prepared.plan)
    return run_rehearsal(make_run(prepared, job), scheduler, rehearsal, as_json)


def _explain(prepared: Prepared, key: str, as_json: bool) -> int:
    from cpm_cluster.launch.explain import explanations, matching
    from cpm_cluster.specs.problems import did_you_mean

    known = list(explanations(prepared.spec, prepared.fit, prepared.plan))
    found = known if key == "all" else matching(known, key)
    if not found:
        hint = did_you_mean(key, (e.key for e in known)) or "; --explain all lists every key"
        raise click.UsageError(f"{key} is no value of this job{hint}")
    as_data = json.dumps([asdict(e) for e in found], indent=1, ensure_ascii=False)
    click.echo(as_data if as_json else "\n".join(map(str, found)))
    return exit_codes.OK


def _show(prepared: Prepared, as_json: bool) -> int:
    from cpm_cluster.cli.dry_run import as_data, as_text

    expected = _expected_start(prepared.plan)
    if as_json:
        click.echo(json.dumps(as_data(prepared, expected), indent=1, ensure_ascii=False))
    else:
        click.echo(as_text(prepared, expected), nl=False)
    return exit_codes.DOES_NOT_FIT if prepared.fit.does_not_fit else exit_codes.OK


def _expected_start(plan: LaunchPlan) -> str:
    """What this machine's Slurm says of the job: when it would start, or why never; empty where there is no Slurm."""
    if plan.scheduler != "slurm" or not here.has_slurm():
        return ""
    from cpm_cluster.schedulers import SchedulerError, open_scheduler

    try:
        return open_scheduler(plan.scheduler).require(plan)
    except SchedulerError as error:
        return str(error)


def _export(prepared: Prepared, job: Path, target: Path, as_json: bool) -> int:
    from cpm_cluster.cli.make_run import make_run
    from cpm_cluster.runs.records import write_text

    if prepared.plan.scheduler != "slurm":
        raise click.UsageError(f"--export writes Slurm scripts, but cluster {prepared.spec.cluster_name} has no Slurm")
    folder = target.absolute().parent
    if not os.access(folder, os.W_OK):
        raise click.UsageError(f"--export {target}: {folder} is no folder that you can write to")
    run = make_run(prepared, job)
    write_text(target, run.files.script.read_text(encoding="utf-8"), 0o755)
    if as_json:
        click.echo(json.dumps({"run": run.id, "run_dir": str(run.files.root), "script": str(target)}))
    else:
        click.echo(f"wrote {target}; the run is prepared in {run.files.root}\nsubmit it with: sbatch {target}")
    return exit_codes.OK


def _submit(prepared: Prepared, job: Path, detach: bool, as_json: bool) -> int:
    from cpm_cluster.cli.make_run import make_run
    from cpm_cluster.cli.start import start
    from cpm_cluster.schedulers import open_scheduler

    scheduler = open_scheduler(prepared.plan.scheduler)
    expected = scheduler.require(prepared.plan)
    if expected:
        click.echo(expected, err=True)
    return start(make_run(prepared, job), scheduler, detach, as_json)
