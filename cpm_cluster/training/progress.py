"""``progress.json``: where the run is now, for a live display."""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path

from cpm_cluster.training.files import write_json
from cpm_cluster.training.settings import Settings

_SECONDS_BETWEEN_WRITES = 0.5
_STEPS_IN_WINDOW = 20


class Progress:
    """Writes the file at phase changes and otherwise at most twice a second; silent on ranks other than 0."""

    def __init__(self, settings: Settings, rank: int) -> None:
        self._path = Path(settings.output_dir) / "progress.json"
        self._active = rank == 0
        self._written_at = 0.0
        self._content: dict[str, object] = {
            "format": 1,
            "phase": "loading",
            "step": 0,
            "steps": settings.training.steps,
            "loss": None,
            "eval_loss": None,
            "lr": None,
            "grad_norm": None,
            "tokens_per_second": None,
            "tokens_seen": 0,
            "eta_seconds": None,
            "world_size": settings.expected_world_size,
            "checkpoint_step": None,
        }

    def enter(self, phase: str, **values: object) -> None:
        """Note a phase and any other values, and write at once."""
        self._content["phase"] = phase
        self._written_at = 0.0
        self.note(**values)

    def note(self, **values: object) -> None:
        """Note values; write unless that was done within the last half second."""
        self._content.update(values)
        now = time.monotonic()
        if self._active and now - self._written_at >= _SECONDS_BETWEEN_WRITES:
            self._written_at = now
            write_json(self._path, {**self._content, "updated_at": time.time()})


class Speed:
    """Tokens and steps per second over the last twenty steps, evaluation and saving left out."""

    def __init__(self) -> None:
        self._window: deque[tuple[float, int]] = deque(maxlen=_STEPS_IN_WINDOW)

    def note(self, seconds: float, tokens: int) -> None:
        """Count one step."""
        self._window.append((seconds, tokens))

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all ranks per second."""
        return sum(tokens for _, tokens in self._window) / self._seconds

    def eta_seconds(self, steps_left: int) -> float:
        """How long the remaining steps take at this speed."""
        return steps_left * self._seconds / len(self._window)

    @property
    def _seconds(self) -> float:
        return max(1e-9, sum(seconds for seconds, _ in self._window))
