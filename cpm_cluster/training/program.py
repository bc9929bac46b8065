"""What the programs of this package share: arguments, the log, errors, exit codes.

Start one for each rank with torchrun, ``torchrun --nproc-per-node N -m cpm_cluster.training.TASK /path/trainer.json``,
or alone without it.

Environment: torchrun's RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT and
TORCHELASTIC_RUN_ID; with CPM_LOG_DIR each rank's output goes to ``$CPM_LOG_DIR/rank-R.log``.

Exit codes: 0 finished, 85 stopped on request (0 under torchrun, which would call any other code a failure), 2
the user can correct it, 1 anything else.
"""

from __future__ import annotations

import argparse
import json
import os
from importlib import import_module
from pathlib import Path
from typing import Callable, Sequence

from cpm_cluster.training.errors import EXIT_FINISHED, EXIT_STOPPED, UserError, end_at_once, record_error
from cpm_cluster.training.placement import Placement, read_placement
from cpm_cluster.training.rank_process import end_with_launcher, send_output_to


def run_program(task: str, does: str, work: str, arguments: Sequence[str] | None) -> int:
    """Run one rank of a task and return its exit code.

    ``does`` is the program's docstring; ``work`` names the function, "module:function", that takes settings, placement
    and the text of the settings and returns "finished" or "stopped".
    """
    path = _parse(task, does, arguments)
    rank, world_size, output_dir = 0, 1, None
    try:
        if "RANK" in os.environ:
            end_with_launcher()
        placement = read_placement(os.environ)
        rank, world_size = placement.rank, placement.world_size
        output_dir = named_output_dir(path)
        if "CPM_LOG_DIR" in os.environ:
            send_output_to(Path(os.environ["CPM_LOG_DIR"]) / f"rank-{rank}.log")
        outcome = _work(task, work, path, placement)
    except Exception as error:  # noqa: BLE001 - the one place that turns any failure into a record and a code
        code = record_error(output_dir, rank, error)
        if world_size > 1:
            end_at_once(code)
        return code
    stopped_alone = outcome == "stopped" and "TORCHELASTIC_RUN_ID" not in os.environ
    return EXIT_STOPPED if stopped_alone else EXIT_FINISHED


def _parse(task: str, does: str, arguments: Sequence[str] | None) -> Path:
    parser = argparse.ArgumentParser(
        prog=f"python -m cpm_cluster.training.{task}",
        description=does,
        epilog="exit codes: 0 finished, 85 stopped on request, 2 the user can correct it, 1 anything else",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("settings", type=Path, help="absolute path of trainer.json")
    settings: Path = parser.parse_args(arguments).settings
    return settings


def _work(task: str, work: str, path: Path, placement: Placement) -> str:
    # Here and not above, because this imports torch, which may fail or crash: the log must be open by then.
    from cpm_cluster.training.settings_file import read_settings

    settings = read_settings(path)
    if settings.task != task:
        raise UserError(f"task is {settings.task}: start the program cpm_cluster.training.{settings.task}")
    module, _, name = work.partition(":")
    function: Callable[..., str] = getattr(import_module(module), name)
    return function(settings, placement, path.read_bytes())


def named_output_dir(path: Path) -> Path | None:
    """Return the output directory that a settings file names, even if the rest of it is wrong."""
    try:
        named = json.loads(path.read_text(encoding="utf-8"))["output_dir"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    usable = isinstance(named, str) and os.path.isabs(named) and os.path.isdir(os.path.dirname(named))
    return Path(named) if usable else None
