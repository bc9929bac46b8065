"""Programs of users' own, judged as the job's workload describes them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from cpm_cluster.planner.fit import Component, Demand
from cpm_cluster.planner.setup import Setup
from cpm_cluster.specs.job import JobSpec
from cpm_cluster.specs.workload import Workload

AS_DESCRIBED = (
    "judged as the job's workload describes its program, which was not read: change a figure there and in the program"
)
# CPM-9G manual, extreme minima of inference: 1 GB of host memory with one GPU, 2 GB with four. A line through both.
LIBCPM_GB, LIBCPM_GB_A_GPU = 2 / 3, 1 / 3
LIBCPM_SPREAD = 0.3
GB = 10**9
MANUAL = "CPM-9G manual, table of extreme minima; linear in the GPUs is assumed"


def demands_of_program(work: Workload, setup: Setup, found: Iterable[Demand]) -> Iterator[Demand]:
    """The demands without those that a program of its own decides: its checkpoints; and the host as LibCPM has it."""
    for demand in found:
        if demand.resource == "host memory" and work.engine == "libcpm":
            yield _libcpm_host(setup, demand.capacity_bytes)
        elif demand.resource != "disk":
            yield demand


def with_steps(spec: JobSpec, work: Workload) -> JobSpec | None:
    """The job with the steps that its program takes; None where they are not stated, or it doesn't train."""
    if work.mode != "train" or work.steps is None:
        return None
    return replace(spec, training=replace(spec.training, steps=work.steps))


def _libcpm_host(setup: Setup, capacity: int | None) -> Demand:
    """It is C++ without torch, and puts the weights on the GPUs as it reads them."""
    size = round((LIBCPM_GB + LIBCPM_GB_A_GPU * setup.gpus_per_node) * GB)
    formula = f"{LIBCPM_GB:.2g} GB + {setup.gpus_per_node} GPUs × {LIBCPM_GB_A_GPU:.2g} GB"
    spread = round(LIBCPM_SPREAD * size)
    process = Component("process", size, formula, MANUAL)
    return Demand("host memory", "node", "inference", (process,), capacity, size - spread, size + spread)
