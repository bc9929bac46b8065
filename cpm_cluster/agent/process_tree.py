"""Processes of a run: adopted when orphaned, found by their environment, ended without remainder.

Linux only: prctl(2), and the files of proc(5).
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import IO, Callable

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
RUN_VARIABLE = "CPM_RUN_ID"


def adopt_orphans() -> None:
    """Make this process the parent of descendants whose own parent dies (PR_SET_CHILD_SUBREAPER)."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def end_with_parent(parent: int, number: int = signal.SIGTERM) -> None:
    """Send this process a signal when its parent ends, also by SIGKILL; at once, if `parent` has ended already."""
    _prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def start_child(
    argv: list[str], environment: dict[str, str], log: IO[bytes], cwd: Path, lock: IO[str] | None = None
) -> subprocess.Popen[bytes]:
    """Start a program in a session of its own, which ends with this process; raises OSError as Popen does.

    A lock is held until the program and all that it starts have ended (flock(2)), whatever becomes of this process.
    """
    parent = os.getpid()
    return subprocess.Popen(
        argv,
        cwd=str(cwd),
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        pass_fds=() if lock is None else (lock.fileno(),),
        preexec_fn=lambda: end_with_parent(parent),
    )


def descendants(pid: int) -> list[int]:
    """Everything alive below a process, parents before children; zombies have ended."""
    found = _children(pid)
    for child in found:
        found += [pid for pid in _children(child) if pid not in found]
    return [pid for pid in found if not _is_zombie(pid)]


def processes_of_run(run_id: str) -> list[int]:
    """Processes of this user that carry the run's id in their environment, and all below them; not this one."""
    numbers = [int(entry.name) for entry in _listed(Path("/proc")) if entry.name.isdigit()]
    carriers = [pid for pid in numbers if carries(pid, run_id)]
    found = dict.fromkeys(carriers)
    for pid in carriers:
        found.update(dict.fromkeys(descendants(pid)))
    found.pop(os.getpid(), None)
    return list(found)


def carries(pid: int, run_id: str) -> bool:
    """Whether a process has the run's id in its environment; a zombie has none, nor has one that is not ours."""
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
    return f"{RUN_VARIABLE}={run_id}".encode() in variables


def send(pids: list[int], number: int) -> None:
    """Signal processes; those that have ended already, or belong to others, are passed over."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except (ProcessLookupError, PermissionError):
            continue


def end_all(find: Callable[[], list[int]], grace_s: float) -> bool:
    """Ask whatever `find` returns to end, kill what is left after `grace_s`; whether nothing is left in the end.

    `find` is called again and again: processes may start others while they end.
    """
    for number, seconds in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 5.0)):
        deadline = time.monotonic() + seconds
        send(find(), number)
        while find() and time.monotonic() < deadline:
            if number == signal.SIGKILL:
                send(find(), number)
            time.sleep(0.05)
    return not find()


def reap(but: int = 0) -> None:
    """Collect adopted children that have ended, but for the one whose status a Popen still waits for."""
    while True:
        try:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if ended is None or ended.si_pid == but:
            return
        os.waitpid(ended.si_pid, 0)


def handlers_of(pid: int, number: int) -> list[int]:
    """The outermost processes, at and below `pid`, that handle a signal: what they started is theirs to tell."""
    if _handles(pid, number):
        return [pid]
    return [handler for child in _children(pid) for handler in handlers_of(child, number)]


def group_exists(group: int) -> bool:
    """Whether a process of this process group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def send_to_group(group: int, number: int) -> None:
    """Signal a process group; one that has ended is passed over."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return


def _children(pid: int) -> list[int]:
    found = []
    for task in _listed(Path(f"/proc/{pid}/task")):
        try:
            found += [int(child) for child in (task / "children").read_text().split()]
        except OSError:
            continue
    return found


def _handles(pid: int, number: int) -> bool:
    """Whether a process has a handler: a bit of SigCgt, proc_pid_status(5)."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return False
    masks = [int(line.split()[1], 16) for line in lines if line.startswith("SigCgt:")]
    return any(mask >> (number - 1) & 1 for mask in masks)


def is_alive(pid: int) -> bool:
    """Whether a process is there, and has not ended already."""
    return not _is_zombie(pid)


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("Z")
    except OSError:
        return True


def _prctl(option: int, argument: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, argument, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _listed(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []
