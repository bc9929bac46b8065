"""What is printed when a run has ended: the loss curve, samples before and after, and where to look next."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

from cpm_cluster.cli.progress_line import progress_line
from cpm_cluster.cli.results import results
from cpm_cluster.diagnosis.verdict import Verdict
from cpm_cluster.runs.records import read_lines
from cpm_cluster.runs.run import Run
from cpm_cluster.runs.state import State
from cpm_cluster.specs.problems import printable
from cpm_cluster.specs.values import format_size

ROWS_OF_CURVE = 12
BAR_WIDTH = 40


def summary(run: Run, state: State, verdict: Verdict | None) -> str:
    """Several lines, ending with the run directory."""
    return "\n".join(_lines(run, state, verdict))


def _lines(run: Run, state: State, verdict: Verdict | None) -> Iterator[str]:
    metrics = read_lines(run.files.root / "metrics.jsonl")
    yield from _curve([row for row in metrics if isinstance(row.get("loss"), (int, float)) and "step" in row])
    yield from _samples(read_lines(run.files.root / "samples.jsonl"))
    yield from results(run.files.root)
    yield ""
    code = "" if state.exit_code in (None, 0) else f" (exit code {state.exit_code})"
    yield f"{run.id}: {state.name}{code}"
    if verdict:
        yield f"  {verdict}"
    elif state.progress:
        yield f"  {progress_line(state.progress)}"
    yield from (f"  {line}" for line in _planned_and_measured(run))
    yield f"  run directory:  {run.files.root}"
    yield f"  {'log of rank 0:' if run.plan.trainer else 'log:':<14}  cpm logs {run.id}"
    if (run.files.root / "tb").is_dir():
        yield f"  curves:         tensorboard --logdir {run.files.root / 'tb'}"
    if (run.files.root / "weights").is_dir():
        yield f"  weights:        {run.files.root / 'weights'}"


def _planned_and_measured(run: Run) -> list[str]:
    """`GPU memory: planned 44.9 GiB (42 GiB to 49 GiB), used 43.1 GiB (-4%)`."""
    from cpm_cluster.calibration.planned import planned_beside_measured  # only at a run's end: it loads the planner

    return [
        f"{one.resource}: planned {format_size(one.planned)} ({format_size(one.low)} to {format_size(one.high)}),"
        f" used {format_size(one.used)} ({one.used / one.planned - 1:+.0%})"
        for one in planned_beside_measured(run)
    ]


def _curve(metrics: list[dict[str, Any]]) -> Iterator[str]:
    """The training loss as bars, at some of the steps, the first and the last among them."""
    if len(metrics) < 2:
        return
    count = min(ROWS_OF_CURVE, len(metrics))
    chosen = [metrics[round(i * (len(metrics) - 1) / (count - 1))] for i in range(count)]
    highest = max(row["loss"] for row in chosen) or 1.0  # a loss may have come down to 0
    yield ""
    yield "  step   loss"
    for row in chosen:
        bar = "█" * max(1, round(BAR_WIDTH * row["loss"] / highest))
        evaluated = f"  eval {row['eval_loss']:.3f}" if row.get("eval_loss") is not None else ""
        yield f"{row['step']:>6}  {row['loss']:>5.3f}  {bar}{evaluated}"


def _samples(samples: list[dict[str, Any]]) -> Iterator[str]:
    """Each prompt with what the model made of it before the first step and after the last."""
    samples = [row for row in samples if isinstance(row.get("prompt"), str) and isinstance(row.get("text"), str)]
    for prompt in dict.fromkeys(row["prompt"] for row in samples):
        yield ""
        yield f"prompt: {printable(prompt)}"
        for row in (row for row in samples if row["prompt"] == prompt):
            when = "before" if row.get("step") == 0 else f"after {row.get('step')} steps"
            yield f"  {when}:"
            yield from textwrap.wrap(printable(row["text"]), 96, initial_indent="    ", subsequent_indent="    ")
