"""Processes that the sandbox starts, found again by process-id files, and the ones that its jobs leave.

A process id alone is no proof: the number may be someone else's by now. A file therefore holds the id, the start
time that the kernel gives (proc(5), stat, field 22), and the boot id.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cpm_cluster.sandbox.commands import wait_for

GRACE_AFTER_KILL_S = 60.0
# as in the service files that come with Slurm: the limits of whoever starts the sandbox are not those of its jobs
LIMITS = {
    resource.RLIMIT_NOFILE: 131072,
    resource.RLIMIT_MEMLOCK: resource.RLIM_INFINITY,
    resource.RLIMIT_STACK: resource.RLIM_INFINITY,
}


@dataclass(frozen=True)
class ProcessFile:
    """The file by which a daemon is found again."""

    path: Path

    @property
    def pid(self) -> int | None:
        """The id of the process, if that very process is alive."""
        try:
            words = self.path.read_text().split()
        except FileNotFoundError:
            return None
        return int(words[0]) if words and words == _identity(words[0]) else None

    def write(self, pid: int) -> None:
        """Remember a process."""
        self.path.write_text(" ".join(_identity(str(pid))) + "\n")

    def end(self, patience_s: float) -> None:
        """SIGTERM, SIGKILL after `patience_s`; returns when the process is gone."""
        for number, seconds in ((signal.SIGTERM, patience_s), (signal.SIGKILL, GRACE_AFTER_KILL_S)):
            pid = self.pid
            if pid is None:
                break
            send([pid], number)
            wait_for(lambda: self.pid is None, seconds)
        if self.pid is None:
            self.path.unlink(missing_ok=True)


def start(argv: Sequence[str], environment: Mapping[str, str], log: Path, file: ProcessFile) -> subprocess.Popen[bytes]:
    """Start a daemon in a session of its own, with nothing of the caller's environment."""
    with open(log, "ab") as output:
        process = subprocess.Popen(
            argv,
            cwd="/",
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            umask=0o022,
            start_new_session=True,
            preexec_fn=_raise_limits,
        )
    file.write(process.pid)
    return process


def end_all(find: Callable[[], set[int]], patience_s: float) -> set[int]:
    """End all processes found, again and again, SIGKILL after `patience_s`; the ids of those that remain."""
    send(find(), signal.SIGTERM)
    if wait_for(lambda: not find(), patience_s):
        return set()

    def gone() -> bool:
        send(find(), signal.SIGKILL)
        return not find()

    wait_for(gone, GRACE_AFTER_KILL_S)
    return find()


def send(pids: Iterable[int], number: int) -> None:
    """Signal processes, some of which may have ended."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass


def in_namespaces(namespaces: Iterable[Path]) -> set[int]:
    """Living processes inside one of the network namespaces that are mounted on these files."""
    wanted = {(path.stat().st_dev, path.stat().st_ino) for path in namespaces if path.exists()}
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and _namespace(entry) in wanted and _stat(entry.name):
            found.add(int(entry.name))
    return found


def _raise_limits() -> None:
    for number, wanted in LIMITS.items():
        try:
            resource.setrlimit(number, (wanted, wanted))
        except (OSError, ValueError):  # root of a container may lack CAP_SYS_RESOURCE
            hard = resource.getrlimit(number)[1]
            resource.setrlimit(number, (hard, hard))


def _namespace(process: Path) -> tuple[int, int] | None:
    try:
        status = os.stat(process / "ns" / "net")
    except OSError:  # it has ended, or hides itself even from root
        return None
    return status.st_dev, status.st_ino


def _identity(pid: str) -> list[str]:
    """Id, start time and boot; empty if there is no such process."""
    fields = _stat(pid)
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return [pid, fields[19], boot] if fields else []


def _stat(pid: str) -> list[str]:
    """Fields of /proc/PID/stat from the third on; empty for a process that has ended, reaped or not."""
    try:
        fields = Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
    return [] if fields[0] in "ZX" else fields
