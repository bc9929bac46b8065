"""How fast a rank's own layers compute: what tells a slow rank from those that wait for it.

A step takes the same time on all ranks, because they exchange gradients in it; with FSDP2 even its forward pass does.
Between the arrival of a layer's weights and the departure of its output, no rank waits for another.
"""

from __future__ import annotations

import time
from typing import Any, Iterable

import torch
from torch import nn


class ForwardClock:
    """A context around a forward pass; CUDA events on a GPU, so that nothing is waited for."""

    def __init__(self, layers: Iterable[nn.Module], device: torch.device) -> None:
        """Watch the layers: before ``fully_shard``, whose gathering must lie outside."""
        self._on_gpu = device.type == "cuda"
        self._running = False
        self._marks: list[Any] = []
        for layer in layers:
            layer.register_forward_pre_hook(self._mark)
            layer.register_forward_hook(self._mark)

    def __enter__(self) -> None:
        self._marks.clear()
        self._running = True

    def __exit__(self, *_: object) -> None:
        self._running = False

    def seconds(self) -> float:
        """Sum over the layers in the newest pass; on a GPU once the device has been synchronised."""
        pairs = zip(self._marks[::2], self._marks[1::2])
        if self._on_gpu:
            return float(sum(begin.elapsed_time(end) for begin, end in pairs)) / 1000
        return float(sum(end - begin for begin, end in pairs))

    def _mark(self, *_: object) -> None:
        # Recomputation calls the layers again, in the backward pass.
        if not self._running:
            return
        if self._on_gpu:
            self._marks.append(torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]
            self._marks[-1].record()
        else:
            self._marks.append(time.perf_counter())
