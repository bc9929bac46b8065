"""cpm plan: whether a job fits, how long it takes and what it costs, before the queue."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cpm_cluster.cli import exit_codes, here, options

if TYPE_CHECKING:
    from cpm_cluster.planner.suggest import Objective
    from cpm_cluster.specs.job import JobSpec

EPILOG = (
    """\
\b
Examples:
  cpm plan jobs/lora_100b.yaml                                 where the bytes go, how long, what it costs
  cpm plan jobs/full_10b.yaml --set resources.nodes=1          the same with a change
  cpm plan jobs/full_10b.yaml --suggest --objective cost       configurations that no other one beats
  cpm plan --calibrate RUN RUN                                 fit the models to runs of your own cluster
  cpm plan --evaluate rows.csv --json predictions.json         how well the models do on measured runs

"""
    + exit_codes.EPILOG
)


@click.command("plan", epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("words", nargs=-1, metavar="[JOB]")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a key of the job: training.lr=1e-4."
)
@click.option("--suggest", "suggesting", is_flag=True, help="Search for configurations of JOB that fit, best first.")
@click.option("--gpus", type=click.IntRange(1), metavar="N", help="With --suggest: exactly so many GPUs.")
@click.option(
    "--objective",
    type=click.Choice(("time", "cost", "gpus")),
    help="With --suggest: what comes first.  [default: time]",
)
@click.option(
    "--evaluate",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="ROWS.csv",
    help="Predict every row of a table of measured runs, and say how far off the predictions are.",
)
@click.option(
    "--calibrate",
    "calibrating",
    is_flag=True,
    help="Fit the models to finished runs, named in place of JOB; later plans of their image and GPU use that.",
)
@options.runs_dir
@click.option(
    "--json",
    "as_json",
    type=click.Path(dir_okay=False, allow_dash=True, path_type=Path),
    is_flag=False,
    flag_value="-",
    metavar="[FILE]",
    help="Print JSON, or write it to FILE.",
)
def command(
    words: tuple[str, ...],
    overrides: tuple[str, ...],
    suggesting: bool,
    gpus: int | None,
    objective: Objective | None,
    evaluate: Path | None,
    calibrating: bool,
    runs_dir: Path,
    as_json: Path | None,
) -> int:
    """Say what the job file JOB needs beside what there is; nothing is submitted."""
    if calibrating:
        if as_json and str(as_json) != "-" and as_json.suffix != ".json":
            words, as_json = (str(as_json), *words), Path("-")  # --json RUN
        if overrides or suggesting or evaluate or not words:
            raise click.UsageError(
                "--calibrate takes the names of finished runs, and nothing else; cpm runs lists them, and"
                " cpm calibrate JOB makes some"
            )
        return _calibrate(words, runs_dir, as_json)
    if len(words) > 1:
        raise click.UsageError("name one job file")
    job = Path(words[0]) if words else None
    if evaluate is not None:
        if job or overrides or suggesting:
            raise click.UsageError("--evaluate reads a table of measured runs; it takes no job")
        return _evaluate(evaluate, as_json)
    if job is None and as_json is not None and str(as_json) != "-":
        job, as_json = as_json, Path("-")  # --json JOB
    if job is None:
        raise click.UsageError("name a job file, or --evaluate ROWS.csv")
    if as_json is not None and as_json.suffix in (".yaml", ".yml"):
        raise click.UsageError(f"--json {as_json} would overwrite what looks like a job file; write to a .json file")
    if (gpus or objective) and not suggesting:
        raise click.UsageError("--gpus and --objective go with --suggest")
    from cpm_cluster.launch.prepare import read_job

    spec = read_job(here.job_file(job), overrides, here.catalogue(), here.has_slurm())
    return _suggest(spec, gpus, objective or "time", as_json) if suggesting else _answer(spec, as_json)


def _answer(spec: JobSpec, as_json: Path | None) -> int:
    from cpm_cluster.calibration.from_runs import calibration_for
    from cpm_cluster.planner.answer import answer

    fit = answer(spec, calibration_for(spec, here.calibrations()))
    if as_json:
        from cpm_cluster.cli.dry_run import fit_data

        _write({"job": spec.name, **fit_data(fit)}, as_json)
    else:
        from cpm_cluster.cli.plan_picture import show

        show(spec, fit)
    return exit_codes.DOES_NOT_FIT if fit.does_not_fit else exit_codes.OK


def _suggest(spec: JobSpec, gpus: int | None, objective: Objective, as_json: Path | None) -> int:
    from cpm_cluster.calibration.from_runs import calibration_for
    from cpm_cluster.planner.suggest import NoSuggestion, suggest

    try:
        found = suggest(spec, gpus, objective, calibration_for(spec, here.calibrations()))
    except NoSuggestion as error:
        raise click.UsageError(str(error)) from None
    if as_json:
        _write({"job": spec.name, **asdict(found)}, as_json)
    else:
        from cpm_cluster.cli.plan_picture import show_suggestions

        show_suggestions(spec, found)
    return exit_codes.OK if found.options else exit_codes.DOES_NOT_FIT


def _calibrate(names: tuple[str, ...], runs_dir: Path, as_json: Path | None) -> int:
    from cpm_cluster.calibration.from_runs import calibrate_runs
    from cpm_cluster.cli.calibration_text import calibration_data, calibration_lines
    from cpm_cluster.planner.calibrate import CalibrationError
    from cpm_cluster.runs.run import find_run

    try:
        found = calibrate_runs((find_run(runs_dir, name) for name in names), here.calibrations())
    except CalibrationError as error:
        raise click.UsageError(str(error)) from None
    if as_json:
        _write(calibration_data(found), as_json)
    else:
        click.echo("\n".join(calibration_lines(found)))
    return exit_codes.OK


def _evaluate(table: Path, as_json: Path | None) -> int:
    from cpm_cluster.cli.evaluation_text import evaluation_lines
    from cpm_cluster.planner.evaluate import evaluate
    from cpm_cluster.planner.row_checks import read_table
    from cpm_cluster.planner.rows import RowError

    try:
        rows, wrong = read_table(table)
    except RowError as error:
        raise click.UsageError(str(error)) from None
    found = evaluate(rows)
    if as_json:
        _write(found.as_json(), as_json)
    if as_json is None or str(as_json) != "-":
        click.echo("\n".join(evaluation_lines(found)))
    for text in wrong:
        click.echo(f"error: not predicted: {text}", err=True)
    return exit_codes.BAD_INPUT if wrong else exit_codes.OK


def _write(data: dict[str, Any], target: Path) -> None:
    text = json.dumps(data, indent=1, ensure_ascii=False) + "\n"
    if str(target) == "-":
        click.echo(text, nl=False)
    else:
        target.write_text(text, encoding="utf-8")
