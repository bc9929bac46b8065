"""Small real processes for tests of the agent."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]


def wait_for(condition: Callable[[], Any], seconds: float = 20.0) -> Any:
    """The first true value of a condition; fails the test when there is none in time."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)
    return value


@contextmanager
def program(source: str, *words: str, language: str = "bash", **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A shell script or Python program that has printed `ready`; killed at the end."""
    argv = ["bash", "-c", source, "bash", *words] if language == "bash" else [sys.executable, "-c", source, *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=environment, **options) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def parent_of(pid: int) -> int:
    """The pid of a process's parent."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[1])


def is_gone(pid: int) -> bool:
    """Whether a process has ended, be it a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("Z")
    except OSError:
        return True
