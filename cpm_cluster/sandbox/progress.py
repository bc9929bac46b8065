"""What `up` and `down` are doing, a line a step, on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def step(name: str) -> Iterator[None]:
    """Print the step's name, and when it is done the seconds that it took."""
    started = time.monotonic()
    _write(f"  {name:<36}")
    try:
        yield
    except BaseException:
        _write(" failed\n")
        raise
    _write(f" {time.monotonic() - started:5.1f} s\n")


def note(text: str) -> None:
    """Print a line."""
    _write(f"  {text}\n")


def _write(text: str) -> None:
    print(text, end="", file=sys.stderr, flush=True)
