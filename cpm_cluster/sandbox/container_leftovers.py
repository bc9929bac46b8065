"""What containers of the sandbox leave when their daemons are killed: processes, mounts, control groups, folders.

Containers outlive dockerd, and conmon outlives podman, so that process-id files do not lead to them. Their root file
system does: it is an overlay whose layers are in a store of the sandbox.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from cpm_cluster.sandbox.cgroups import MOUNT

_PROC = Path("/proc")
_TEMPORARY = Path("/tmp")


def container_processes(root: Path) -> set[int]:
    """Processes in containers of any runtime whose layers are below `root`."""
    return {int(entry.name) for entry in _processes() if f"upperdir={root}/" in _root_mount(entry)}


def user_processes(root: Path, uid: int) -> set[int]:
    """Processes of a user whose command line or environment names `root`: daemons, conmon, shells at home there."""
    wanted = f"{root}/".encode()
    return {
        int(entry.name)
        for entry in _processes()
        if _owner(entry) == uid and any(wanted in _content(entry / name) for name in ("cmdline", "environ"))
    }


def remove_control_groups(path: str) -> None:
    """Remove empty control groups of this path, with those below, in all hierarchies of version 1, or in that of 2."""
    for top in (*MOUNT.glob(f"*/{path}"), MOUNT / path):
        below = (group for group in top.rglob("*") if group.is_dir())
        for group in (*sorted(below, key=lambda group: len(group.parts), reverse=True), top, top.parent):
            try:
                group.rmdir()
            except OSError:  # it is not there, or the group of another daemon is in it
                pass


def remove_temporary_folders(uid: int) -> None:
    """Folders in /tmp of podman without XDG_RUNTIME_DIR, and of a rootlesskit that was killed."""
    names = (f"podman-run-{uid}", f"containers-user-{uid}", "rootlesskit*")
    for path in (path for name in names for path in _TEMPORARY.glob(name)):
        if _owner(path) == uid:
            shutil.rmtree(path, ignore_errors=True)


def _processes() -> Iterator[Path]:
    return (entry for entry in _PROC.iterdir() if entry.name.isdigit())


def _root_mount(process: Path) -> str:
    """Its root file system's line of mountinfo (proc(5)); empty for a process that has ended."""
    lines = _content(process / "mountinfo").decode(errors="replace").splitlines()
    return next((line for line in lines if line.split()[4] == "/"), "")


def _owner(path: Path) -> int | None:
    try:
        return path.stat().st_uid
    except OSError:
        return None


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
