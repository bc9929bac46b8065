"""The Fit: what a job needs of each resource beside what there is, how long it takes, its cost, and what would help."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cpm_cluster.planner.cost import Cost
from cpm_cluster.planner.step_time import StepTime
from cpm_cluster.specs.values import format_duration, format_size

Verdict = Literal["fits", "tight", "does not fit", "capacity unknown"]
MEMORY = ("GPU memory", "host memory")  # without these, nothing can be promised


@dataclass(frozen=True)
class Component:
    """One term of a demand: bytes, and the formula that gave them, with its source."""

    name: str
    bytes: int
    formula: str
    source: str = ""


@dataclass(frozen=True)
class Demand:
    """What one resource must hold at its fullest instant, per GPU, per node or for the run, and how sure that is."""

    resource: str
    per: Literal["GPU", "node", "run"]
    instant: str
    components: tuple[Component, ...]
    capacity_bytes: int | None
    low_bytes: int
    high_bytes: int

    @property
    def bytes(self) -> int:
        return sum(component.bytes for component in self.components)

    @property
    def size(self) -> str:
        """`39 GiB`, or `39 GiB (37 GiB to 42 GiB)`."""
        low, high = format_size(self.low_bytes), format_size(self.high_bytes)
        return format_size(self.bytes) + (f" ({low} to {high})" if low != high else "")

    @property
    def verdict(self) -> Verdict:
        """`fits` only where the high end does, `does not fit` only where not even the low one does."""
        if self.capacity_bytes is None:
            return "capacity unknown"
        if self.low_bytes > self.capacity_bytes:
            return "does not fit"
        return "fits" if self.high_bytes <= self.capacity_bytes else "tight"


@dataclass(frozen=True)
class RunTime:
    """How long the steps of a run take beside its time limit, at which it stops with a checkpoint and can go on."""

    step: StepTime
    steps: int
    limit_s: int | None
    warning_s: int  # so long before the limit it stops
    starts_again: bool  # by itself

    @property
    def seconds(self) -> float:
        return self.step.seconds * self.steps

    @property
    def low_s(self) -> float:
        return self.step.low * self.steps

    @property
    def high_s(self) -> float:
        return self.step.high * self.steps

    @property
    def usable_s(self) -> int | None:
        return None if self.limit_s is None else max(1, self.limit_s - self.warning_s)

    @property
    def segments(self) -> int:
        """Starts that the run is likely to need."""
        return 1 if self.usable_s is None else max(1, -(-round(self.seconds) // self.usable_s))

    @property
    def verdict(self) -> Verdict:
        """A run that goes on by itself fits as long as each start gets a step done."""
        if self.usable_s is None:
            return "capacity unknown"
        if self.step.low > self.usable_s:
            return "does not fit"
        if self.high_s <= self.usable_s or (self.starts_again and self.step.high <= self.usable_s):
            return "fits"
        return "tight"

    @property
    def size(self) -> str:
        """`19 h 17 min (16 h 4 min to 23 h 9 min)`."""
        return f"{format_duration(self.seconds)} ({format_duration(self.low_s)} to {format_duration(self.high_s)})"

    @property
    def limit(self) -> str:
        """What the time limit means for the run."""
        if self.limit_s is None:
            return "no time limit is stated"
        told = f"time limit {format_duration(self.limit_s)}"
        if self.segments == 1:
            return told
        how = "Slurm starts it again by itself" if self.starts_again else "go on with cpm resume"
        return f"{told}: {self.segments} starts, each from the newest checkpoint; {how}"


@dataclass(frozen=True)
class Advice:
    """A change that makes a job fit, as `--set` texts, and what it costs."""

    change: str
    overrides: tuple[str, ...]
    effect: str
    verdict: Verdict

    def __str__(self) -> str:
        return f"{self.change}: {self.effect}" + (", but tight" if self.verdict == "tight" else "")


@dataclass(frozen=True)
class Fit:
    """All demands of a job, its time and cost, and what to change where it does not fit."""

    demands: tuple[Demand, ...]
    time: RunTime | None = None
    cost: Cost | None = None
    advice: tuple[Advice, ...] = ()
    nothing_helps: bool = False  # advice was sought, and not found
    as_described: bool = False  # of a program of the user's own, which nobody has read
    notes: tuple[str, ...] = ()  # what the figures leave open

    @property
    def verdict(self) -> Verdict:
        """The worst; `fits` only where memory is judged, of GPUs and of hosts alike."""
        found = {demand.verdict for demand in self.demands} | ({self.time.verdict} if self.time else set())
        if "does not fit" in found or "tight" in found:
            return "does not fit" if "does not fit" in found else "tight"
        memory = {demand.verdict for demand in self.demands if demand.resource in MEMORY}
        return "fits" if memory == {"fits"} else "capacity unknown"

    @property
    def told(self) -> str:
        """The verdict for people."""
        if self.verdict != "capacity unknown":
            return self.verdict + (", as workload describes it" if self.as_described else "")
        some = any(demand.resource in MEMORY and demand.verdict == "fits" for demand in self.demands)
        return "fits as far as is known" if some else "not judged"

    @property
    def does_not_fit(self) -> bool:
        return self.verdict == "does not fit"

    def shortages(self, verdict: Verdict = "does not fit") -> tuple[str, ...]:
        """One sentence for each demand of that verdict."""
        found = [
            f"{demand.resource}: {demand.size} for each {demand.per} of {format_size(demand.capacity_bytes or 0)},"
            f" {demand.instant}"
            for demand in self.demands
            if demand.verdict == verdict
        ]
        if self.time and self.time.verdict == verdict:
            found.append(f"time: {self.time.size}; {self.time.limit}")
        return tuple(found)
