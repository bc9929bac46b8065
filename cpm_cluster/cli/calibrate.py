"""cpm calibrate: short runs of a job's model on its own GPUs, and the calibration that they come to."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cpm_cluster.cli import exit_codes, here, options

if TYPE_CHECKING:
    from cpm_cluster.calibration.trials import Trial
    from cpm_cluster.runs.run import Run
    from cpm_cluster.runs.state import State

EPILOG = (
    """\
\b
Examples:
  cpm calibrate jobs/lora_10b.yaml              three runs of well under a minute, then the calibration
  cpm calibrate jobs/lora_10b.yaml --dry-run    what they would be
  cpm plan --calibrate RUN RUN RUN              the same from runs that you have

JSON: `trials` ({what, steps, run, run_dir, state}), `calibration` (of each quantity: multipliers, residual, runs),
`enough` (whether the runs tell its terms apart), `refused` ({run, why}), `path`.

"""
    + exit_codes.EPILOG
)


@click.command("calibrate", epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("job", type=click.Path(readable=False, path_type=Path))
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a key of the job: training.lr=1e-4."
)
@click.option("--dry-run", is_flag=True, help="Say what would run, and touch nothing.")
@options.runs_dir
@options.as_json
def command(job: Path, overrides: tuple[str, ...], dry_run: bool, runs_dir: Path, as_json: bool) -> int:
    """Train a few layers of JOB's model for about two minutes on one node, in three sizes, and calibrate the planner.

    Later plans of its image, GPU and engine use what was measured.
    """
    from cpm_cluster.calibration.trials import NoTrial, trials
    from cpm_cluster.launch.prepare import read_job
    from cpm_cluster.planner.answer import judge

    job = here.job_file(job)
    spec = read_job(job, overrides, here.catalogue(), here.has_slurm())
    try:
        found = trials(spec, judge)
    except NoTrial as error:
        raise click.UsageError(str(error)) from None
    if dry_run:
        lines = [f"{trial.what}: {trial.spec.training.steps} steps" for trial in found]
        click.echo(_json({"trials": list(map(_planned, found))}) if as_json else "\n".join(lines))
        return exit_codes.OK
    ended = [_run(trial, job, runs_dir, f"{number} of {len(found)}", as_json) for number, trial in enumerate(found, 1)]
    runs = [run for run, _ in ended]
    if not as_json:
        return _calibrate(runs)
    trials_data = [
        {**_planned(trial), "run": run.id, "run_dir": str(run.files.root), "state": state.name}
        for trial, (run, state) in zip(found, ended, strict=True)
    ]
    return _calibrate(runs, {"trials": trials_data})


def _planned(trial: Trial) -> dict[str, Any]:
    return {"what": trial.what, "steps": trial.spec.training.steps}


def _json(data: dict[str, Any]) -> str:
    return json.dumps(data, indent=1, ensure_ascii=False)


def _run(trial: Trial, job: Path, runs_dir: Path, number: str, as_json: bool) -> tuple[Run, State]:
    """Run one trial to its end, whatever that is: a calibration says which it leaves out. With JSON, stdout waits."""
    from cpm_cluster.cli.make_run import make_run
    from cpm_cluster.launch.prepare import prepare
    from cpm_cluster.runs.run import new_run_id, run_directory
    from cpm_cluster.schedulers import open_scheduler

    run_id = new_run_id(trial.spec.name)
    prepared = prepare(trial.spec, run_id, run_directory(runs_dir, run_id), here.submitter())
    scheduler = open_scheduler(prepared.plan.scheduler)
    scheduler.require(prepared.plan)
    click.echo(f"run {number}: {trial.what}, {trial.spec.training.steps} steps", err=as_json)
    run = make_run(prepared, job)
    scheduler.submit(run)
    state = _watched(run, as_json)
    click.echo(f"  {state.name}" + ("" if state.name == "finished" else f"; cpm status {run.id} says why"), err=as_json)
    return run, state


def _watched(run: Run, as_json: bool) -> State:
    """Until it ends; Ctrl-C cancels it."""
    from cpm_cluster.cli.cancel import cancel_run
    from cpm_cluster.cli.follow import POLL_S, open_view
    from cpm_cluster.monitoring.run_state import current_state, settle

    view = open_view(run, as_json)
    try:
        while not (state := current_state(run)).ended:
            view.show(state)
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        cancel_run(run)
        raise
    finally:
        view.pause()
    settle(run, state)
    return state


def _calibrate(runs: list[Run], as_data: dict[str, Any] | None = None) -> int:
    """Say what the runs come to: in words, or as JSON beside what `as_data` has."""
    from cpm_cluster.calibration.from_runs import calibrate_runs
    from cpm_cluster.cli.calibration_text import calibration_data, calibration_lines
    from cpm_cluster.planner.calibrate import CalibrationError

    try:
        found = calibrate_runs(runs, here.calibrations())
    except CalibrationError as error:
        text = f"nothing was calibrated:\n{error}"
        if as_data is None:
            click.echo(f"error: {text}", err=True)
        else:
            click.echo(_json({"error": text, **as_data}))
        return exit_codes.FAILED
    lines = calibration_lines(found)
    click.echo("\n".join(lines) if as_data is None else _json({**as_data, **calibration_data(found)}))
    return exit_codes.OK
