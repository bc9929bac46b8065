"""What tasks evaluate and generate found, when they have ended."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cpm_cluster.runs.records import read_json
from cpm_cluster.specs.problems import printable


def results(run_directory: Path) -> Iterator[str]:
    """Perplexity by source, accuracy by file, where the answers are; nothing of a run that trains."""
    found = read_json(run_directory / "evaluation.json") or {}
    perplexities: list[dict[str, Any]] = found.get("perplexity", [])
    choices: list[dict[str, Any]] = found.get("choices", [])
    if perplexities or choices:
        yield ""
    for row in perplexities:
        yield f"  perplexity {row['perplexity']:.3f}  {printable(row['source'])} ({row['tokens']:,} tokens)"
    for row in choices:
        yield (
            f"  accuracy {row['accuracy']:.1%} ± {row['standard_error']:.1%}, by length"
            f" {row['accuracy_normalised']:.1%}  {printable(row['file'])} ({row['questions']:,} questions,"
            f" {row['shots']} shots)"
        )
    answers = run_directory / "generated.jsonl"
    if answers.exists():
        yield ""
        yield f"  answers: {answers}"
