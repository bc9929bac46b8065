"""The Fit: what a job needs of each resource, beside what there is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cpm_cluster.specs.values import format_size

Verdict = Literal["fits", "does not fit", "not ruled out", "capacity unknown"]


@dataclass(frozen=True)
class Component:
    """One term of a demand: bytes, and the formula that gave them, with its source."""

    name: str
    bytes: int
    formula: str
    source: str = ""


@dataclass(frozen=True)
class Demand:
    """What one resource must hold at its fullest instant, per GPU or per node.

    `upper_bytes` is None where only a lower bound is known; then a demand can be ruled out, but not proven to fit.
    """

    resource: str
    per: Literal["GPU", "node", "run"]
    instant: str
    components: tuple[Component, ...]
    capacity_bytes: int | None
    upper_bytes: int | None = None

    @property
    def lower_bytes(self) -> int:
        return sum(component.bytes for component in self.components)

    @property
    def size(self) -> str:
        """`39 GiB`, or `at least 39 GiB` where only a lower bound is known."""
        return ("at least " if self.upper_bytes is None else "") + format_size(self.upper_bytes or self.lower_bytes)

    @property
    def verdict(self) -> Verdict:
        if self.capacity_bytes is None:
            return "capacity unknown"
        if self.lower_bytes > self.capacity_bytes:
            return "does not fit"
        if self.upper_bytes is not None and self.upper_bytes <= self.capacity_bytes:
            return "fits"
        return "not ruled out"


@dataclass(frozen=True)
class Fit:
    """All demands of a job, and what to change where one does not fit."""

    demands: tuple[Demand, ...]
    advice: tuple[str, ...]

    @property
    def ruled_out(self) -> bool:
        """Whether some demand certainly exceeds what there is."""
        return any(demand.verdict == "does not fit" for demand in self.demands)
