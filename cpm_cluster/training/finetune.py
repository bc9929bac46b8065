"""Train a CPM: ``torchrun --nproc-per-node N -m cpm_cluster.training.finetune /path/trainer.json``.

Full tuning from random or given weights, or LoRA; one process without torchrun. What it leaves in
``output_dir``: ``progress.json``, ``metrics.jsonl``, ``samples.jsonl``, ``tb/``, ``checkpoints/``,
``weights/``, ``outcome.json``, and ``errors/rank-R.json`` of ranks that failed. It stops at the next step, with
a checkpoint, on SIGTERM, on SIGUSR2, when ``control/stop`` is there, and when its launcher dies. A second start
continues from the newest whole checkpoint.

Environment: torchrun's RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT and
TORCHELASTIC_RUN_ID; with CPM_LOG_DIR each rank's output goes to ``$CPM_LOG_DIR/rank-R.log``.

Exit codes: 0 finished, 85 stopped on request (0 under torchrun, which would call any other code a failure), 2
the user can correct it, 1 anything else.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Sequence

from cpm_cluster.training.errors import EXIT_FINISHED, EXIT_STOPPED, end_at_once, record_error
from cpm_cluster.training.placement import read_placement
from cpm_cluster.training.rank_process import end_with_launcher, send_output_to


def main(arguments: Sequence[str] | None = None) -> int:
    """Run this rank and return its exit code."""
    parser = argparse.ArgumentParser(prog="cpm_cluster.training.finetune", description="Train a CPM.")
    parser.add_argument("settings", type=Path, help="absolute path of trainer.json")
    path = parser.parse_args(arguments).settings
    rank, world_size, output_dir = 0, 1, None
    try:
        if "RANK" in os.environ:
            end_with_launcher()
        placement = read_placement(os.environ)
        rank, world_size = placement.rank, placement.world_size
        output_dir = named_output_dir(path)
        if "CPM_LOG_DIR" in os.environ:
            send_output_to(Path(os.environ["CPM_LOG_DIR"]) / f"rank-{rank}.log")
        # Here and not above, because this imports torch, which may fail or crash: the log must be open by then.
        from cpm_cluster.training.run import finetune
        from cpm_cluster.training.settings_file import read_settings

        outcome = finetune(read_settings(path), placement, path.read_bytes())
    except Exception as error:  # noqa: BLE001 - the one place that turns any failure into a record and a code
        code = record_error(output_dir, rank, error)
        if world_size > 1:
            end_at_once(code)
        return code
    stopped_alone = outcome == "stopped" and "TORCHELASTIC_RUN_ID" not in os.environ
    return EXIT_STOPPED if stopped_alone else EXIT_FINISHED


def named_output_dir(path: Path) -> Path | None:
    """Return the output directory that a settings file names, even if the rest of it is wrong."""
    try:
        named = json.loads(path.read_text(encoding="utf-8"))["output_dir"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    usable = isinstance(named, str) and os.path.isabs(named) and os.path.isdir(os.path.dirname(named))
    return Path(named) if usable else None


if __name__ == "__main__":
    sys.exit(main())
