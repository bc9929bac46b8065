"""What is printed when a run has ended: the loss curve, samples before and after, and where to look next."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cpm_cluster.cli.progress_line import progress_line
from cpm_cluster.diagnosis.verdict import Verdict
from cpm_cluster.runs.run import Run
from cpm_cluster.runs.state import State
from cpm_cluster.specs.problems import printable

ROWS_OF_CURVE = 12
BAR_WIDTH = 40


def summary(run: Run, state: State, verdict: Verdict | None) -> str:
    """Several lines, ending with the run directory."""
    return "\n".join(_lines(run, state, verdict))


def _lines(run: Run, state: State, verdict: Verdict | None) -> Iterator[str]:
    metrics = _jsonl(run.files.root / "metrics.jsonl")
    yield from _curve(metrics)
    yield from _samples(_jsonl(run.files.root / "samples.jsonl"))
    yield ""
    code = "" if state.exit_code in (None, 0) else f" (exit code {state.exit_code})"
    yield f"{run.id}: {state.name}{code}"
    if verdict:
        yield f"  {verdict}"
    elif state.progress:
        yield f"  {progress_line(state.progress)}"
    yield f"  run directory:  {run.files.root}"
    yield f"  log of rank 0:  cpm logs {run.id}"
    if (run.files.root / "tb").is_dir():
        yield f"  curves:         tensorboard --logdir {run.files.root / 'tb'}"
    if (run.files.root / "weights").is_dir():
        yield f"  weights:        {run.files.root / 'weights'}"


def _curve(metrics: list[dict[str, Any]]) -> Iterator[str]:
    """The training loss as bars, at some of the steps, the first and the last among them."""
    if len(metrics) < 2:
        return
    count = min(ROWS_OF_CURVE, len(metrics))
    chosen = [metrics[round(i * (len(metrics) - 1) / (count - 1))] for i in range(count)]
    highest = max(row["loss"] for row in chosen)
    yield ""
    yield "  step   loss"
    for row in chosen:
        bar = "█" * max(1, round(BAR_WIDTH * row["loss"] / highest))
        evaluated = f"  eval {row['eval_loss']:.3f}" if row.get("eval_loss") is not None else ""
        yield f"{row['step']:>6}  {row['loss']:>5.3f}  {bar}{evaluated}"


def _samples(samples: list[dict[str, Any]]) -> Iterator[str]:
    """Each prompt with what the model made of it before the first step and after the last."""
    for prompt in dict.fromkeys(row["prompt"] for row in samples):
        yield ""
        yield f"prompt: {printable(prompt)}"
        for row in (row for row in samples if row["prompt"] == prompt):
            when = "before" if row["step"] == 0 else f"after {row['step']} steps"
            yield f"  {when}:"
            yield from textwrap.wrap(printable(row["text"]), 96, initial_indent="    ", subsequent_indent="    ")


def _jsonl(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    return [json.loads(line) for line in lines if line.endswith("}")]
