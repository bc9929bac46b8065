"""What containers and their user leave when daemons are killed: processes, control groups, temporary files.

Containers outlive dockerd, and conmon outlives podman, so that process-id files do not lead to them. A container of
root is known by its root file system, an overlay whose layers are in a store of the sandbox. All that belongs to the
ordinary user and to its subordinate ids is the sandbox's: the account is for nothing else.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

from cpm_cluster.sandbox.cgroups import MOUNT
from cpm_cluster.sandbox.commands import wait_for

PATIENCE_S = 5.0
TEMPORARY = (Path("/tmp"), Path("/var/tmp"), Path("/dev/shm"))
_PROC = Path("/proc")


def container_processes(root: Path) -> set[int]:
    """Processes in containers of any runtime whose layers are below `root`."""
    return {int(entry.name) for entry in _processes() if f"upperdir={root}/" in _root_mount(entry)}


def daemon_processes(folder: Path) -> set[int]:
    """Processes whose command line names a folder of sockets: dockerd, its containerd, and the latter's shims."""
    wanted = f"{folder}/".encode()
    return {int(entry.name) for entry in _processes() if wanted in _content(entry / "cmdline")}


def processes_of(users: Collection[range]) -> set[int]:
    """Living processes of these user ids."""
    return {int(entry.name) for entry in _processes() if _belongs(entry, users) and _content(entry / "cmdline")}


def remove_files_of(users: Collection[range], folders: tuple[Path, ...] = TEMPORARY) -> None:
    """Remove what belongs to these user ids at the top of the folders for temporary files and shared memory."""
    for path in (path for folder in folders for path in folder.iterdir()):
        if _belongs(path, users):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def remove_control_groups(path: str) -> None:
    """Remove the control groups of this path, in all hierarchies of version 1 and 2, once they are empty."""
    wait_for(lambda: not _remove_empty(path), PATIENCE_S)


def _remove_empty(path: str) -> list[Path]:
    """What could not be removed; the parent goes with its last child."""
    tops = [top for top in (*MOUNT.glob(f"*/{path}"), MOUNT / path) if top.exists()]
    for top in tops:
        below = (group for group in top.rglob("*") if group.is_dir())
        for group in (*sorted(below, key=lambda group: len(group.parts), reverse=True), top, top.parent):
            try:
                group.rmdir()
            except OSError:  # something is in it, if only for a moment
                pass
    return [top for top in tops if top.exists()]


def _processes() -> Iterator[Path]:
    return (entry for entry in _PROC.iterdir() if entry.name.isdigit())


def _root_mount(process: Path) -> str:
    """Its root file system's line of mountinfo (proc(5)); empty for a process that has ended."""
    lines = _content(process / "mountinfo").decode(errors="replace").splitlines()
    return next((line for line in lines if line.split()[4] == "/"), "")


def _belongs(path: Path, users: Collection[range]) -> bool:
    try:
        owner = path.lstat().st_uid
    except OSError:
        return False
    return any(owner in ids for ids in users)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
