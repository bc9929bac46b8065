"""One question to nvidia-smi about all GPUs of the step, whose answer nobody waits for.

A driver that has lost a GPU may keep nvidia-smi in the kernel, where no signal ends it: it is asked once more never.
"""

from __future__ import annotations

import os
import subprocess
import time
from typing import Any, Sequence

FIELDS = (
    ("memory_used_mib", "memory.used"),
    ("memory_total_mib", "memory.total"),
    ("utilisation_percent", "utilization.gpu"),
    ("temperature_c", "temperature.gpu"),
    ("power_w", "power.draw"),
    ("ecc_uncorrected", "ecc.errors.uncorrected.volatile.total"),
)
ARGV = [
    "nvidia-smi",
    "--query-gpu=uuid," + ",".join(query for _, query in FIELDS),
    "--format=csv,noheader,nounits",
]
# Without persistence mode, eight GPUs take seconds.
PATIENCE_S = 10.0


class GpuQuery:
    """`ask`, then call `answer` until it is not None."""

    def __init__(self, uuids: Sequence[str], patience_s: float = PATIENCE_S) -> None:
        self._uuids, self._patience_s = uuids, patience_s
        self._process: subprocess.Popen[bytes] | None = None
        self._deadline = 0.0
        self._hung = False
        self.problem = ""

    def ask(self) -> None:
        """Start nvidia-smi, unless it has hung before, or still works on the last answer."""
        if self._hung or self._process is not None:
            return
        self.problem = ""
        self._deadline = time.monotonic() + self._patience_s
        try:
            self._process = subprocess.Popen(
                ARGV, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
        except OSError as error:
            self.problem = f"nvidia-smi: {error.strerror}"

    def answer(self, patient: bool = True) -> list[dict[str, Any]] | None:
        """The GPUs; none where it failed, and then `problem` says how. None as long as it may still answer."""
        process = self._process
        if process is None:
            return []
        if process.poll() is not None:
            self._process = None
            # its exit status may have been collected by whoever reaps orphans: the text alone tells
            text = _all_of(process)
            found = parsed(text, self._uuids)
            self.problem = "" if found else f"nvidia-smi: {text.strip()[:200] or 'it said nothing'}"
            return found
        if patient and time.monotonic() < self._deadline:
            return None
        self._process, self._hung = None, True
        self.problem = "nvidia-smi did not answer in time, and is not asked again"
        process.kill()
        return []


def parsed(text: str, uuids: Sequence[str]) -> list[dict[str, Any]]:
    """A mapping a GPU: its uuid, and numbers, None where the driver has none ([N/A], [Unknown Error]).

    `uuids` are those wanted, all if empty; one that nvidia-smi no longer lists has no numbers at all.
    """
    rows = [[field.strip() for field in line.split(",")] for line in text.splitlines()]
    listed = {row[0]: row[1:] for row in rows if len(row) == len(FIELDS) + 1}
    names = [name for name, _ in FIELDS]
    wanted = (uuids or listed) if listed else ()
    return [{"uuid": uuid, **dict(zip(names, map(_number, listed.get(uuid, [""] * len(names)))))} for uuid in wanted]


def _number(text: str) -> float | int | None:
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        return None


def _all_of(process: subprocess.Popen[bytes]) -> str:
    """What a process that has ended has printed; a child that it left may keep the pipe open."""
    assert process.stdout is not None
    with process.stdout as pipe:
        os.set_blocking(pipe.fileno(), False)
        return (pipe.read() or b"").decode("utf-8", "replace")
