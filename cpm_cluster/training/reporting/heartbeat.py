"""``heartbeats/rank-R.json``: what each rank does, and since when, for whoever looks for one that hangs.

The training thread notes where it is, at the price of an assignment; a thread of its own writes that every few
seconds. A rank that hangs therefore shows an old ``since`` with a fresh ``time``, and one that does not run at all (it
was stopped, its node is gone, native code holds Python's lock) an old ``time``.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

from cpm_cluster.training.files import replace_quickly

_SECONDS_BETWEEN_WRITES = 5.0


class Heartbeat:
    """One rank's file. Phases in a step: ``data``, ``compute``, and ``exchange``, where a rank awaits the others."""

    def __init__(self, output_dir: Path, rank: int) -> None:
        """Write the first beat, and start the thread; a rank alone knows its file."""
        self._path = output_dir / "heartbeats" / f"rank-{rank}.json"
        self._same = {"format": 1, "rank": rank, "pid": os.getpid(), "host": socket.gethostname()}
        self._doing = (0, "loading", time.time())
        self._closed = threading.Event()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._write()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def enter(self, phase: str, step: int) -> None:
        """Note what this rank does now; ``step`` is the one in progress, or the last one finished between steps."""
        self._doing = (step, phase, time.time())

    def close(self, ended: str) -> None:
        """Write the last beat: where this rank was, and how it ended."""
        self._closed.set()
        self._thread.join()
        self._write(ended)

    def _beat(self) -> None:
        while not self._closed.wait(_SECONDS_BETWEEN_WRITES):
            self._write()

    def _write(self, ended: str | None = None) -> None:
        """Replace the file, unsynced: after a power cut nobody asks for it. A full disk does not end a run."""
        step, phase, since = self._doing
        now = {"step": step, "phase": phase, "since": since, "time": time.time(), "ended": ended}
        with suppress(OSError):
            replace_quickly(self._path, json.dumps({**self._same, **now}) + "\n")


def clear_heartbeats(output_dir: Path, world_size: int) -> None:
    """Remove those of ranks that an earlier attempt had and this one has not."""
    for path in (output_dir / "heartbeats").glob("rank-*.json"):
        number = path.stem.split("-")[-1]
        if number.isdigit() and int(number) >= world_size:
            path.unlink()
