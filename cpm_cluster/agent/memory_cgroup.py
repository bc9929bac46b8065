"""The memory control group of the step: what it holds, what it may hold, and how often the kernel has killed in it.

Versions 1 and 2 (cgroups(7)). A daemon of root puts its containers into groups elsewhere: then that of the ranks is
told of. Where version 1 counts a kill in the group of the process alone, a group that a container takes with it has
to be looked at often.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROC = Path("/proc")
MOUNT = Path("/sys/fs/cgroup")
# Version 1 says "no limit" in pages: anything as large as that.
UNLIMITED = 1 << 60
FILES = {
    1: ("memory.usage_in_bytes", "memory.limit_in_bytes", "memory.oom_control"),
    2: ("memory.current", "memory.max", "memory.events"),
}


@dataclass(frozen=True)
class Group:
    """A memory control group."""

    version: int
    path: Path

    @property
    def root(self) -> Path:
        """The folder of the whole hierarchy."""
        return MOUNT if self.version == 2 else MOUNT / "memory"


class MemoryCgroup:
    """Follows the step's group, and that of the ranks once it is known."""

    def __init__(self, pid: int | str = "self") -> None:
        own = group_of(pid)
        self._main = own and _step(own)
        self._kills = {group: 0 for group in (own, self._main) if group}
        # what was killed in it before is none of ours
        self._earlier = {group: _kills(group) or 0 for group in self._kills}
        self._rank: int | None = None

    def look(self, rank: int | None = None) -> int:
        """Count the kills, those in the group of a rank included; all since the beginning."""
        if rank is not None and rank != self._rank:
            self._rank = rank
            self._include(group_of(rank))
        for group in self._kills:
            now = _kills(group)
            if now is not None:
                self._kills[group] = now - self._earlier.get(group, 0)
        nested = self._main is not None and self._main.version == 2
        return sum(n for group, n in self._kills.items() if not (nested and _is_below(group, self._main)))

    def measure(self, rank: int | None = None) -> dict[str, Any] | None:
        """Bytes now, the least limit on the way up (None: no limit), kills; None where there is no such group."""
        kills = self.look(rank)
        if self._main is None:
            return None
        return {"current_bytes": _number(self._main, 0), "max_bytes": _limit(self._main), "oom_kills": kills}

    def _include(self, group: Group | None) -> None:
        if group is None:
            return
        self._kills.setdefault(group, 0)
        if self._main is None or not (group == self._main or _is_below(group, self._main)):
            self._main = group


def group_of(pid: int | str) -> Group | None:
    """The group of a process, if it can be known: it may have ended."""
    try:
        lines = (PROC / str(pid) / "cgroup").read_text().splitlines()
    except OSError:
        return None
    for line in sorted(lines, reverse=True):  # version 2 is `0::`, and comes last where both are there
        number, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            return Group(1, MOUNT / "memory" / path.lstrip("/"))
        if number == "0":
            return Group(2, MOUNT / path.lstrip("/"))
    return None


def _step(group: Group) -> Group:
    """Slurm gives each task a group below its step's (cgroup.conf(5)); the step's holds all of them."""
    steps = [folder for folder in (group.path, *group.path.parents) if folder.name.startswith("step_")]
    return Group(group.version, steps[-1]) if steps else group


def _is_below(group: Group, other: Group | None) -> bool:
    return other is not None and other.path in group.path.parents


def _limit(group: Group) -> int | None:
    """The least of the limits of a group and of those above it, bytes."""
    above = [folder for folder in (group.path, *group.path.parents) if group.root in (folder, *folder.parents)]
    limits = [limit for limit in (_number(Group(group.version, folder), 1) for folder in above) if limit is not None]
    return min((limit for limit in limits if limit < UNLIMITED), default=None)


def _number(group: Group, index: int) -> int | None:
    text = _text(group, index).strip()
    return int(text) if text.isdigit() else None


def _kills(group: Group) -> int | None:
    words = [line.split() for line in _text(group, 2).splitlines()]
    return next((int(word[1]) for word in words if len(word) == 2 and word[0] == "oom_kill"), None)


def _text(group: Group, index: int) -> str:
    try:
        return (group.path / FILES[group.version][index]).read_text()
    except OSError:
        return ""
