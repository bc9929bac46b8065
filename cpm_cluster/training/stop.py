"""Requests to stop at the next step boundary: SIGTERM, SIGUSR2, or the file ``control/stop``.

The trainer leaves the file where it is; whoever starts the next attempt removes it first.
"""

from __future__ import annotations

import signal
from pathlib import Path


class StopRequest:
    """Remembers that this rank was asked to stop; the ranks agree on it between steps."""

    def __init__(self, output_dir: Path) -> None:
        """Install the signal handlers. They only set a flag: a step must not be torn by a signal."""
        self._file = output_dir / "control" / "stop"
        self._signalled = False
        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, self._note)

    @property
    def pending(self) -> bool:
        """Whether a signal came or the file is there."""
        return self._signalled or self._file.exists()

    def _note(self, number: int, frame: object) -> None:
        self._signalled = True
