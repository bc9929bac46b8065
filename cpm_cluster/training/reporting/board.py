"""TensorBoard events under ``tb/``, written with tensorboardX."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, Mapping


class Board:
    """The event file of a run from one step on; writes nothing where tensorboardX is not installed.

    The image cpmlive-flash:0.0.4 lacks it: metrics.jsonl has the same figures, so a run need not end over it.
    """

    def __init__(self, directory: Path, after_step: int) -> None:
        """Begin a file that takes the place of what was written beyond ``after_step``."""
        self._writer: Any = None
        try:
            from tensorboardX import SummaryWriter  # type: ignore[import-untyped]
        except ImportError:
            print("no TensorBoard events: tensorboardX is not installed here (pip install tensorboardX)", flush=True)
            return
        # tensorboardX names files by the second and would overwrite those of an attempt just ended.
        suffix = f".{os.getpid()}.{time.monotonic_ns()}"
        self._writer = SummaryWriter(str(directory), purge_step=after_step + 1, filename_suffix=suffix)

    def scalars(self, values: Mapping[str, float], step: int, wall_time: float) -> None:
        """Write tags and values as one event: each that is added passes through a queue to the writer's thread."""
        if self._writer is None:
            return
        from tensorboardX.proto.summary_pb2 import Summary  # type: ignore[import-untyped]

        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
        self._writer.file_writer.add_summary(summary, step, wall_time)

    def text(self, tag: str, text: str, step: int) -> None:
        """Write a text in Markdown."""
        if self._writer is not None:
            self._writer.add_text(tag, text, step)

    def flush(self) -> None:
        """Make what is written visible."""
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Write out what is buffered."""
        if self._writer is not None:
            self._writer.close()
