"""Requests to stop at the next step boundary: SIGTERM, SIGUSR2, or the file ``control/stop``.

The trainer leaves the file where it is; whoever starts the next attempt removes it first.
"""

from __future__ import annotations

import signal
import time
from pathlib import Path

# A run of thousands of ranks asks its file system about one name no oftener than this.
_SECONDS_BETWEEN_LOOKS = 0.2


class Stopped(Exception):
    """A rank was asked to stop, all ranks know it, and there is nothing to save that is not on disk."""


class StopRequest:
    """Remembers that this rank was asked to stop; the ranks agree on it between steps."""

    def __init__(self, output_dir: Path) -> None:
        """Install the signal handlers. They only set a flag: a step must not be torn by a signal."""
        self._file = output_dir / "control" / "stop"
        self._asked = False
        self._looked_at = -_SECONDS_BETWEEN_LOOKS
        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, self._note)

    @property
    def pending(self) -> bool:
        """Whether a signal came or the file is there."""
        now = time.monotonic()
        if not self._asked and now - self._looked_at >= _SECONDS_BETWEEN_LOOKS:
            self._looked_at = now
            # A signal may come in between: it is not to be forgotten.
            self._asked = self._file.exists() or self._asked
        return self._asked

    def _note(self, number: int, frame: object) -> None:
        self._asked = True
