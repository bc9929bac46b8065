"""The guard over the loss: what is no number, and what leaps out of the recent losses, does not reach the weights.

It is asked between the backward pass and the update, and sees what all ranks see, so that all decide alike. A spike is
a loss more than ``spike_deviations`` standard deviations above the mean of the last ``window`` accepted ones; before
as many have been accepted nothing is one. ``skip`` leaves the update out and goes on with the next data; ``rollback``
returns to the last whole checkpoint, but not to its data: what has been read since is not read again (as PaLM was
trained, Chowdhery et al. 2022, §5.1). Each cause may do so ``limit`` times; then, and with ``stop``, the run ends.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any, Mapping, NamedTuple

from cpm_cluster.training.settings import GuardSettings

# Losses that are equal to three digits have no spread to measure a spike by.
_LEAST_DEVIATION = 1e-3


class Incident(NamedTuple):
    """A step that was not accepted: ``cause`` is "nonfinite" or "spike", ``action`` "skip" or "rollback"."""

    step: int
    cause: str
    action: str
    text: str


class LossGuard:
    """Judges each step, and remembers what its judgement rests on."""

    def __init__(self, settings: GuardSettings) -> None:
        self._settings = settings
        self._losses: deque[float] = deque(maxlen=settings.window)
        self._counts = {"nonfinite": 0, "spike": 0}
        self._incident: Incident | None = None

    @property
    def incidents(self) -> int:
        """How many steps were not accepted."""
        return sum(self._counts.values())

    def accept(self, step: int, loss: float, grad_norm: float) -> bool:
        """Take a step's loss among the recent ones and return True, or note the incident and return False.

        Raises FloatingPointError when the incident ends the run.
        """
        cause, text = self._objection(step, loss, grad_norm)
        if not cause:
            self._losses.append(loss)
            return True
        action = self._settings.nonfinite if cause == "nonfinite" else self._settings.spike
        if action == "stop":
            raise FloatingPointError(text)
        limit = self._settings.limit
        if self._counts[cause] == limit:
            raise FloatingPointError(f"{text}, after {limit} such steps already (training.guard.limit)")
        self._counts[cause] += 1
        done = "left out" if action == "skip" else "rolled back"
        self._incident = Incident(step, cause, action, f"{text}: {done} ({self._counts[cause]} of {limit})")
        return False

    def take_incident(self) -> Incident | None:
        """Return the incident of the step just done, once."""
        incident, self._incident = self._incident, None
        return incident

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"losses": list(self._losses), "counts": dict(self._counts)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what a checkpoint kept; nothing of a run's beginning."""
        self.recall_losses(state)
        self._counts.update(state.get("counts", {}))

    def recall_losses(self, state: Mapping[str, Any]) -> None:
        """Take over the losses alone, after a rollback, which counts."""
        self._losses = deque(state.get("losses", ()), maxlen=self._settings.window)

    def _objection(self, step: int, loss: float, grad_norm: float) -> tuple[str, str]:
        """Return cause and text; both empty for a good step."""
        if not math.isfinite(loss):
            return "nonfinite", f"the loss of step {step} is {loss}"
        if not math.isfinite(grad_norm):
            return "nonfinite", f"the gradient norm of step {step} is {grad_norm}, with a loss of {loss:.4f}"
        if self._settings.spike == "ignore" or len(self._losses) < self._settings.window:
            return "", ""
        mean = math.fsum(self._losses) / len(self._losses)
        variance = math.fsum((other - mean) ** 2 for other in self._losses) / len(self._losses)
        deviation = max(math.sqrt(variance), _LEAST_DEVIATION * abs(mean))
        if loss <= mean + self._settings.spike_deviations * deviation:
            return "", ""
        usual = f"{mean:.4f} ± {deviation:.4f} in the {len(self._losses)} steps before"
        return "spike", f"the loss of step {step} is {loss:.4f}, after {usual}"
