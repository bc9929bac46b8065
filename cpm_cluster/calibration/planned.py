"""What was planned of a run, as its record keeps it, and what was measured beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from cpm_cluster.planner.fit import Fit
from cpm_cluster.planner.job_setup import job_setup
from cpm_cluster.planner.setup import Setup, Shape
from cpm_cluster.runs.measured import measured, predicted
from cpm_cluster.runs.run import Run
from cpm_cluster.specs.job import JobSpec

MIB = 1 << 20


@dataclass(frozen=True)
class Beside:
    """One resource of a run: what was planned of it, and its peak. Bytes."""

    resource: str
    planned: int
    low: int
    high: int
    used: int


def planned_record(spec: JobSpec, fit: Fit) -> dict[str, Any]:
    """The fit, and of which setup: none where GPUs are pretended, or the program is the user's own."""
    pretended = spec.resources.gpus_per_node and spec.cluster.pretend_gpus
    setup = job_setup(spec) if spec.engine != "command" and not pretended else None
    inputs = {"image": spec.image.tag if spec.image else None, "setup": asdict(setup) if setup else None}
    return {"verdict": fit.verdict, **asdict(fit), **inputs}


def recorded_setup(record: Mapping[str, Any]) -> Setup | None:
    """The setup in a record; None where it keeps none.

    Raises:
        TypeError, KeyError: it is of another version of cpm-cluster.
    """
    kept = record.get("setup")
    if not isinstance(kept, Mapping):
        return None
    values = {**kept, "shape": Shape(**kept["shape"]), "lora_targets": tuple(kept["lora_targets"])}
    return Setup(**values)


def planned_beside_measured(run: Run) -> Iterator[Beside]:
    """Of each resource that was measured."""
    peaks = measured(run)
    used = {
        "GPU memory": peaks.gpu_memory_mib and peaks.gpu_memory_mib * MIB,
        "host memory": peaks.host_memory_bytes,
    }
    for demand in (predicted(run) or {}).get("demands", ()):
        size = used.get(demand["resource"])
        planned = sum(component["bytes"] for component in demand["components"])
        if size and planned:
            yield Beside(demand["resource"], planned, demand["low_bytes"], demand["high_bytes"], round(size))
