"""What `up` and `down` are doing, a line a step, on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def step(name: str) -> Iterator[None]:
    """Print the step's name when it is done, with the seconds it took."""
    started = time.monotonic()
    yield
    note(f"{name:<34} {time.monotonic() - started:5.1f} s")


def note(text: str) -> None:
    """Print a line."""
    print(f"  {text}", file=sys.stderr, flush=True)
