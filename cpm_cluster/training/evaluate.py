"""Measure a CPM: perplexity over data.eval, and accuracy on multiple-choice questions.

It leaves in output_dir: evaluation.json, progress.json, outcome.json, index/ (the data as token ids),
heartbeats/rank-R.json of every rank, and errors/rank-R.json of ranks that failed. It stops between batches on SIGTERM,
on SIGUSR2, when control/stop is there, and when its launcher dies. A second start begins anew, but for the index.
"""

from __future__ import annotations

import sys
from typing import Sequence

from cpm_cluster.training.program import run_program


def main(arguments: Sequence[str] | None = None) -> int:
    """Run this rank and return its exit code."""
    return run_program("evaluate", __doc__, "cpm_cluster.training.inference.evaluation:evaluate", arguments)


if __name__ == "__main__":
    sys.exit(main())
