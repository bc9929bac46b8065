"""The operating system's side of a rank: where its output goes, and that it does not outlive its launcher."""

from __future__ import annotations

import ctypes
import faulthandler
import io
import os
import signal
import sys
from pathlib import Path

from cpm_cluster.training.errors import UserError

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def send_output_to(log: Path) -> None:
    """Append what this process and its native libraries print, and the traceback of a crash, to a file.

    Raises UserError when the file cannot be opened.
    """
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError as error:
        raise UserError(f"CPM_LOG_DIR: cannot write {log}: {error.strerror}") from error
    for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
        stream.flush()
        os.dup2(descriptor, number)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)
    os.close(descriptor)
    faulthandler.enable()


def end_with_launcher() -> None:
    """Have the kernel send SIGTERM to this process when its launcher dies, be it of SIGKILL (prctl(2)).

    Nothing else would tell: torchrun gives each rank a session of its own. Linux only.
    """
    if sys.platform != "linux":
        return
    launcher = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != launcher:  # it died before the kernel knew
        os.kill(os.getpid(), signal.SIGTERM)
