"""Control groups: how Slurm can hold a job's processes here, and what is left of it at the end."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cpm_cluster.sandbox.commands import wait_for
from cpm_cluster.sandbox.state import Sandbox

MOUNT = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Confinement:
    """Slurm's plugins for this machine, and what they cannot do."""

    proctrack: str
    task_plugin: str
    memory: bool
    caveat: str = ""


def confinement(mount: Path = MOUNT) -> Confinement:
    """Control groups where they are of version 1, the one that many slurmd on one machine can share."""
    if all((mount / controller / "cgroup.procs").exists() for controller in ("freezer", "devices")):
        return Confinement("proctrack/cgroup", "task/cgroup", (mount / "memory" / "cgroup.procs").exists())
    return Confinement(
        "proctrack/linuxproc",
        "task/none",
        memory=False,
        caveat=f"no control groups of version 1 below {mount}: jobs are not kept from other GPUs, nor within their"
        " memory, and a process that leaves its parents outlives its job",
    )


def processes(state: Sandbox) -> set[int]:
    """Living processes in the groups of the sandbox's jobs."""
    return {int(word) for group in _groups(state) for word in _members(group).split()}


def remove(state: Sandbox) -> list[Path]:
    """Remove the groups of the sandbox's jobs; those that cannot be removed."""
    wait_for(lambda: not _remove_empty(state), 5)
    return _groups(state)


def _members(group: Path) -> str:
    try:
        return (group / "cgroup.procs").read_text()
    except OSError:  # Slurm has removed it meanwhile
        return ""


def _groups(state: Sandbox) -> list[Path]:
    """The groups of the nodes, inner ones first."""
    roots = [root for name in state.node_names for root in MOUNT.glob(f"*/slurm_{name}")]
    inner = [group for root in roots for group in root.rglob("*") if group.is_dir()]
    return sorted([*roots, *inner], key=lambda group: len(group.parts), reverse=True)


def _remove_empty(state: Sandbox) -> list[Path]:
    for group in _groups(state):
        try:
            group.rmdir()
        except OSError:
            pass
    return _groups(state)
