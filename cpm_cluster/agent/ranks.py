"""The ranks of a node as proc(5) shows them: who they are, what they were started with, the memory that they take.

A rank in a container is a process of the host, too. Its environment is its user's to read, and so are the containers
of a rootless runtime, whose user namespace belongs to that user.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterable

from cpm_cluster.agent import process_tree

# Each node and attempt has its own, and the program alone is given it: see program_environment.
MARK = "CPM_LOG_DIR"


@dataclass(frozen=True)
class Process:
    """A process of the program; `rank` is None for what is no rank, as a launcher or a shell."""

    pid: int
    parent: int
    born: str
    rank: int | None
    ranks_per_node: int | None
    variables: dict[str, str]

    @property
    def is_there(self) -> bool:
        """Whether it goes on; another process may have its pid by now."""
        return _identity(self.pid) == (self.parent, self.born)


def of_program(log_dir: str, among: Iterable[int], keep: Callable[[str], bool]) -> list[Process]:
    """Those of some processes that the program is made of, with the variables whose names are to be kept."""
    found = (_read(pid, log_dir, keep) for pid in among)
    return [process for process in found if process is not None]


def ranks(processes: Iterable[Process]) -> list[Process]:
    """The ranks, by number: the outermost processes with a RANK, since what they start inherits it."""
    numbered = {process.pid: process for process in processes if process.rank is not None}
    found = [p for p in numbered.values() if p.parent not in numbered or numbered[p.parent].rank != p.rank]
    return sorted(found, key=lambda process: process.rank or 0)


def outermost(processes: Iterable[Process]) -> list[Process]:
    """Those that none of the others has started."""
    by_pid = {process.pid: process for process in processes}
    return [process for process in by_pid.values() if process.parent not in by_pid]


def on_this_machine() -> list[int]:
    """Every process that /proc lists."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def memory(process: Process) -> dict[str, Any]:
    """Resident memory of a rank and of what it has started, bytes: all of it, and its part in shared memory.

    Pages that several of them share count for each: a true share (smaps_rollup) would cost milliseconds a gigabyte.
    """
    family = [process.pid, *process_tree.descendants(process.pid)]
    sizes = [resident(pid) for pid in family]
    return {
        "rank": process.rank,
        "pid": process.pid,
        "processes": len(family),
        "rss_bytes": sum(rss for rss, _ in sizes),
        "shm_bytes": sum(shm for _, shm in sizes),
    }


def resident(pid: int) -> tuple[int, int]:
    """VmRSS and RssShmem of a process, bytes; 0 where it has ended."""
    found = {"VmRSS": 0, "RssShmem": 0}
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        name, _, value = line.partition(":")
        if name in found:
            found[name] = int(value.split()[0]) << 10
    return found["VmRSS"], found["RssShmem"]


def _read(pid: int, log_dir: str, keep: Callable[[str], bool]) -> Process | None:
    try:
        texts = Path(f"/proc/{pid}/environ").read_bytes().decode("utf-8", "replace").split("\0")
    except OSError:  # it has ended, or is somebody else's
        return None
    variables = dict(text.split("=", 1) for text in texts if "=" in text)
    identity = _identity(pid) if variables.get(MARK) == log_dir else None
    if identity is None:
        return None
    rank, size = variables.get("RANK", ""), variables.get("LOCAL_WORLD_SIZE", "")
    return Process(
        pid,
        *identity,
        rank=int(rank) if rank.isdecimal() else None,
        ranks_per_node=int(size) if size.isdecimal() else None,
        variables={name: value for name, value in variables.items() if keep(name)},
    )


def _identity(pid: int) -> tuple[int, str] | None:
    """Parent, and start in ticks since boot; None for what has ended, be it a zombie."""
    try:
        state, parent, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except (OSError, ValueError):
        return None
    return None if state == "Z" else (int(parent), rest[17])
