"""``progress.json``: where the run is now, for a live display and for the orchestrator, which parses no text.

Rates are of all ranks over the last steps; ``mfu`` and ``memory_bytes`` (of the fullest rank: allocated on the GPU,
resident without one) are null where unknown; ``guard_events`` counts the steps that the loss guard did not accept, and
``last_event`` tells of the newest. ``done`` and ``total`` are the bytes of text that phase ``loading data`` encodes;
``epoch`` counts from 0.
"""

from __future__ import annotations

import json
import time
from collections import deque
from contextlib import suppress
from pathlib import Path

from cpm_cluster.training.files import replace_quickly
from cpm_cluster.training.settings import Settings, WorkSettings

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
            "done": None,
            "total": None,
            "step": 0,
            "steps": settings.training.steps,
            "loss": None,
            "eval_loss": None,
            "lr": None,
            "grad_norm": None,
            "tokens_per_second": None,
            "step_seconds": None,
            "mfu": None,
            "memory_bytes": None,
            "tokens_seen": 0,
            "epoch": 0,
            "guard_events": 0,
            "last_event": None,
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
        """Note values; write unless that was done within the last half second. A full disk does not end a run."""
        self._content.update(values)
        now = time.monotonic()
        if self._active and now - self._written_at >= _SECONDS_BETWEEN_WRITES:
            self._written_at = now
            content = {**self._content, "updated_at": time.time()}
            with suppress(OSError):
                replace_quickly(self._path, json.dumps(content, allow_nan=False, indent=1) + "\n")


class Speed:
    """Tokens and steps per second over the last twenty steps, evaluation and saving left out."""

    def __init__(self, work: WorkSettings, world_size: int) -> None:
        self._work, self._world_size = work, world_size
        self._window: deque[tuple[float, int]] = deque(maxlen=_STEPS_IN_WINDOW)

    def note(self, seconds: float, tokens: int) -> None:
        """Count one step."""
        self._window.append((seconds, tokens))

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all ranks per second."""
        return sum(tokens for _, tokens in self._window) / self._seconds

    @property
    def step_seconds(self) -> float:
        """Seconds a step."""
        return self._seconds / len(self._window)

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation: FLOPs that the tokens need, over those that the ranks could do at their peak.

        Chowdhery et al. 2022, appendix B; padding and recomputation do not count. None where either is unknown.
        """
        needed, peak = self._work.flops_per_token, self._work.peak_flops_per_rank
        if not needed or not peak:
            return None
        return self.tokens_per_second * needed / (peak * self._world_size)

    def eta_seconds(self, steps_left: int) -> float:
        """How long the remaining steps take at this speed."""
        return steps_left * self.step_seconds

    @property
    def _seconds(self) -> float:
        return max(1e-9, sum(seconds for seconds, _ in self._window))
