"""Train a CPM on prompts and answers: full tuning from random or given weights, or LoRA.

It leaves in output_dir: progress.json, metrics.jsonl, samples.jsonl, tb/, checkpoints/, weights/, outcome.json,
events/trainer.jsonl where the loss guard did something, index/ (the data as token ids), heartbeats/rank-R.json of every
rank, and errors/rank-R.json of ranks that failed. It stops at the next step, with a checkpoint, on SIGTERM, on SIGUSR2,
when control/stop is there, and when its launcher dies. A second start continues from the newest whole checkpoint.
"""

from __future__ import annotations

import sys
from typing import Sequence

from cpm_cluster.training.program import run_program


def main(arguments: Sequence[str] | None = None) -> int:
    """Run this rank and return its exit code."""
    return run_program("finetune", __doc__, "cpm_cluster.training.run:train", arguments)


if __name__ == "__main__":
    sys.exit(main())
