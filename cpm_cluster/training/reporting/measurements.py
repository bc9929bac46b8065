"""What is measured from one record to the next, on all ranks: waits, memory, and how evenly the ranks compute."""

from __future__ import annotations

import math
import resource
import time
from contextlib import contextmanager
from statistics import median_low
from typing import Callable, Iterator, Sequence

import torch

Exchange = Callable[[Sequence[float]], "list[tuple[float, ...]]"]


class Meter:
    """Adds up this rank's times; :meth:`read` exchanges them and begins anew."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._steps = 0
        self._data = self._forward = self._checkpoint = 0.0

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Count the time within as a wait for data."""
        started = time.monotonic()
        yield
        self._data += time.monotonic() - started

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Count the time within as training that stands still for a checkpoint."""
        started = time.monotonic()
        yield
        self._checkpoint += time.monotonic() - started

    def step(self, forward_seconds: float | None) -> None:
        """Count a step, with what its engine measured of this rank's own speed."""
        self._steps += 1
        self._forward += math.nan if forward_seconds is None else forward_seconds

    def read(self, exchange: Exchange) -> dict[str, int | float | None]:
        """Return the means per step, and the sum for checkpoints, of the rank with the largest. Collective.

        Seconds and bytes. Memory is the highest since the start: of the GPU what tensors took (allocated) and what
        torch holds for them (reserved), None on a CPU; of the host what is resident.
        """
        steps = max(1, self._steps)
        ranks = exchange([self._data / steps, self._checkpoint, *_memory(), self._forward / steps])
        self._reset()
        data, checkpoint, resident, allocated, reserved = (max(of_ranks) for of_ranks in list(zip(*ranks))[:-1])
        return {
            "data_seconds": data,
            "checkpoint_seconds": checkpoint,
            "memory_resident_bytes": int(resident),
            "memory_allocated_bytes": int(allocated) or None,
            "memory_reserved_bytes": int(reserved) or None,
            **stragglers([of_rank[-1] for of_rank in ranks]),
        }


def stragglers(forward_seconds: Sequence[float]) -> dict[str, int | float | None]:
    """Compare the ranks' forward passes: the slowest rank, the median and how many times that it took.

    The lower median of an even number; all None where a rank has measured nothing (NaN).
    """
    if not all(seconds > 0 for seconds in forward_seconds):
        return {"slowest_rank": None, "forward_seconds": None, "slowest_over_median": None}
    middle, slowest = median_low(forward_seconds), max(forward_seconds)
    return {
        "slowest_rank": forward_seconds.index(slowest),
        "forward_seconds": middle,
        "slowest_over_median": slowest / middle,
    }


def _memory() -> tuple[float, float, float]:
    """Peaks in bytes: resident, and 0 or allocated and reserved on the GPU."""
    resident = float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    if not torch.cuda.is_available():
        return resident, 0.0, 0.0
    return resident, float(torch.cuda.max_memory_allocated()), float(torch.cuda.max_memory_reserved())
