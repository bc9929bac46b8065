"""How a rank fails: user errors in one sentence, all else with its traceback, both recorded as JSON."""

from __future__ import annotations

import os
import sys
import time
import traceback
from pathlib import Path

from cpm_cluster.training.files import write_json

EXIT_FINISHED = 0
EXIT_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_STOPPED = 85


class UserError(Exception):
    """Something that the user can correct (settings, data, the launch); its message needs no traceback."""


def record_error(output_dir: Path | None, rank: int, error: BaseException) -> int:
    """Tell stderr and ``errors/rank-R.json`` why this rank ends, and return its exit code."""
    user_error = isinstance(error, UserError)
    if user_error:
        print(f"rank {rank}: error: {error}", file=sys.stderr, flush=True)
    else:
        traceback.print_exception(type(error), error, error.__traceback__)
    if output_dir is not None:
        try:
            write_json(output_dir / "errors" / f"rank-{rank}.json", _as_json(rank, error, user_error))
        except OSError as failure:
            print(f"rank {rank}: cannot record the error: {failure}", file=sys.stderr, flush=True)
    return EXIT_USER_ERROR if user_error else EXIT_FAILED


def end_at_once(code: int) -> None:
    """End the process without destructors: those of a broken group of ranks may block."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def clear_errors(output_dir: Path, rank: int, world_size: int) -> None:
    """Remove what an earlier attempt left: each rank its file, rank 0 those of ranks that no longer exist."""
    for path in (output_dir / "errors").glob("rank-*.json"):
        number = path.stem.split("-")[-1]
        if number == str(rank) or (rank == 0 and number.isdigit() and int(number) >= world_size):
            path.unlink()


def _as_json(rank: int, error: BaseException, user_error: bool) -> dict[str, object]:
    file, line = _raised_at(error)
    return {
        "rank": rank,
        "type": type(error).__name__,
        "message": str(error),
        "file": file,
        "line": line,
        "time": time.time(),
        "user_error": user_error,
    }


def _raised_at(error: BaseException) -> tuple[str | None, int | None]:
    frames = traceback.extract_tb(error.__traceback__)
    return (frames[-1].filename, frames[-1].lineno) if frames else (None, None)
