"""Dynamic loss scaling for fp16 gradients (Micikevicius et al. 2018, §3.2)."""

from __future__ import annotations

FIRST, LARGEST, SMALLEST = 2.0**16, 2.0**25, 1.0
STEPS_TO_DOUBLE = 1000


class LossScale:
    """Halves on overflow, doubles after 1,000 steps without one; from 1 to CPM-9G's maximum of 2^25."""

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self.value = FIRST if enabled else 1.0
        self._clean_steps = 0

    @property
    def can_halve(self) -> bool:
        """Whether a smaller scale is left to try after an overflow."""
        return self.enabled and self.value > SMALLEST

    def update(self, overflowed: bool) -> None:
        """Take note of one step."""
        self._clean_steps = 0 if overflowed else self._clean_steps + 1
        if overflowed:
            self.value = max(SMALLEST, self.value / 2)
        elif self.enabled and self._clean_steps == STEPS_TO_DOUBLE:
            self.value = min(LARGEST, self.value * 2)
            self._clean_steps = 0

    def as_json(self) -> dict[str, float]:
        """Return the state for a checkpoint; without a scale, what fp16 begins with if the next attempt takes that."""
        if not self.enabled:
            return {"value": FIRST, "clean_steps": 0}
        return {"value": self.value, "clean_steps": self._clean_steps}

    def restore(self, state: dict[str, float]) -> None:
        """Take over the state of a checkpoint, which may be of another precision."""
        if self.enabled:
            self.value, self._clean_steps = state["value"], int(state["clean_steps"])
