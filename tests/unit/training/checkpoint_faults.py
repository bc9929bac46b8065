"""What may befall a rank that saves: it is killed at some point, its disk is slow, or full.

Each is handed to ``start_ranks`` and takes hold in the rank's process.
"""

from __future__ import annotations

import io
import os
import signal
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

# Where a rank can be killed; those of the second line only rank 0 comes to.
POINTS = (
    *("clock", "update", "staging", "bytes", "sum"),
    *("index", "manifest", "rename", "latest", "removal"),
)
ONLY_RANK_0 = POINTS[5:]


@dataclass(frozen=True)
class Killed:
    """A rank dies of SIGKILL when it comes to a point for the nth time; "clock": n centiseconds after a first step."""

    rank: int
    point: str
    time: int

    def __call__(self, rank: int) -> None:
        if rank == self.rank:
            getattr(self, f"_{self.point}")(Countdown(self.time))

    def _clock(self, countdown: Countdown) -> None:
        def begin(*arguments) -> None:
            if countdown.first():
                threading.Timer(self.time / 100, die).start()

        _before(_adamw(), "step", begin)

    def _update(self, countdown: Countdown) -> None:
        _before(_adamw(), "step", countdown)

    def _staging(self, countdown: Countdown) -> None:
        from cpm_cluster.training.engines.torch_state import StagedTraining

        _before(StagedTraining, "__init__", countdown)

    def _bytes(self, countdown: Countdown) -> None:
        class Torn(io.FileIO):
            def write(self, data) -> int:
                if countdown.reached():
                    super().write(bytes(data)[: len(data) // 2])
                    die()
                return super().write(data)

        _open_with(lambda path: Torn(path, "wb"))

    def _sum(self, countdown: Countdown) -> None:
        from cpm_cluster.training import checkpoint

        _before(checkpoint, "sha256_of", countdown)

    def _index(self, countdown: Countdown) -> None:
        from torch.distributed.checkpoint.filesystem import FileSystemWriter

        _before(FileSystemWriter, "finish", countdown)

    def _manifest(self, countdown: Countdown) -> None:
        from cpm_cluster.training import checkpoint

        _before(checkpoint, "write_json", countdown)

    def _rename(self, countdown: Countdown) -> None:
        _before(os, "rename", countdown)

    def _latest(self, countdown: Countdown) -> None:
        from cpm_cluster.training.checkpoint import Checkpoints

        _before(Checkpoints, "_point_at", countdown)

    def _removal(self, countdown: Countdown) -> None:
        def begin(path, **options) -> None:
            if path.exists() and countdown.reached():
                next(path.iterdir()).unlink()
                die()

        _before(__import__("shutil"), "rmtree", begin)


@dataclass(frozen=True)
class SlowDisk:
    """The first file of the tensors takes some seconds to open, on every rank."""

    seconds: float

    def __call__(self, rank: int) -> None:
        countdown = Countdown(1)

        def opened(path):
            if countdown.reached():
                time.sleep(self.seconds)
            return path.open("wb")

        _open_with(opened)


@dataclass(frozen=True)
class FullDisk:
    """A rank's nth file of tensors meets a full disk."""

    rank: int
    time: int

    def __call__(self, rank: int) -> None:
        countdown = Countdown(self.time)
        if rank == self.rank:
            _open_with(lambda path: Path("/dev/full" if countdown.reached() else path).open("wb"))  # noqa: SIM115


class Countdown:
    """Counts how often something happens; as a hook it kills the rank the nth time."""

    def __init__(self, times: int) -> None:
        self._left, self._times = times, times

    def __call__(self, *arguments, **options) -> None:
        if self.reached():
            die()

    def first(self) -> bool:
        """Count, and tell whether this is the first time."""
        self._left -= 1
        return self._left == self._times - 1

    def reached(self) -> bool:
        """Count, and tell whether this is the nth time."""
        self._left -= 1
        return self._left == 0


def die() -> None:
    """End this process as nothing can prevent."""
    os.kill(os.getpid(), signal.SIGKILL)


def _adamw():
    from torch.optim import AdamW

    return AdamW


def _before(owner, name: str, hook) -> None:
    original = getattr(owner, name)

    def hooked(*arguments, **options):
        hook(*arguments, **options)
        return original(*arguments, **options)

    setattr(owner, name, hooked)


def _open_with(opened) -> None:
    """Have DCP open the files that it writes tensors to in another way."""
    from torch.distributed.checkpoint.filesystem import FileSystem

    original = FileSystem.create_stream

    @contextmanager
    def create_stream(self, path, mode):
        if mode == "wb" and str(path).endswith(".distcp"):
            with opened(path) as stream:
                yield stream
        else:
            with original(self, path, mode) as stream:
                yield stream

    FileSystem.create_stream = create_stream
