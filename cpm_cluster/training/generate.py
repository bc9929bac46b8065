"""Continue the prompts of a jsonl file, {"input": ...} a line, wrapped as in fine-tuning.

It leaves in output_dir: generated.jsonl, a line for each prompt in their order, progress.json, outcome.json,
heartbeats/rank-R.json of every rank, and errors/rank-R.json of ranks that failed; generated/ holds the answers of a run
that has not ended. It stops between batches on SIGTERM, on SIGUSR2, when control/stop is there, and when its launcher
dies. A second start does the prompts that have no answer yet.
"""

from __future__ import annotations

import sys
from typing import Sequence

from cpm_cluster.training.program import run_program


def main(arguments: Sequence[str] | None = None) -> int:
    """Run this rank and return its exit code."""
    return run_program("generate", __doc__, "cpm_cluster.training.inference.generation:generate", arguments)


if __name__ == "__main__":
    sys.exit(main())
