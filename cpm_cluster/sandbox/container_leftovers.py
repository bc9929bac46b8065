"""What containers of the sandbox leave when their daemons are killed: processes, mounts, control groups, folders.

Containers outlive dockerd, and conmon outlives podman, so that process-id files do not lead to them. Their root file
system does: it is an overlay whose layers are in a store of the sandbox.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from cpm_cluster.sandbox.cgroups import MOUNT
from cpm_cluster.sandbox.commands import wait_for

PATIENCE_S = 5.0
_PROC = Path("/proc")
_TEMPORARY = Path("/tmp")


def container_processes(root: Path) -> set[int]:
    """Processes in containers of any runtime whose layers are below `root`."""
    return {int(entry.name) for entry in _processes() if f"upperdir={root}/" in _root_mount(entry)}


def daemon_processes(folder: Path) -> set[int]:
    """Processes whose command line names a folder of sockets: dockerd, its containerd, and the latter's shims."""
    wanted = f"{folder}/".encode()
    return {int(entry.name) for entry in _processes() if wanted in _content(entry / "cmdline")}


def user_processes(root: Path, uid: int) -> set[int]:
    """Processes of a user whose command line or environment names `root`: daemons, conmon, shells at home there."""
    wanted = f"{root}/".encode()
    return {
        int(entry.name)
        for entry in _processes()
        if _owner(entry) == uid and any(wanted in _content(entry / name) for name in ("cmdline", "environ"))
    }


def remove_control_groups(path: str) -> None:
    """Remove the control groups of this path, in all hierarchies of version 1 and 2, once they are empty."""
    wait_for(lambda: not _remove_empty(path), PATIENCE_S)


def remove_temporary_folders(uid: int) -> None:
    """Folders in /tmp of podman without XDG_RUNTIME_DIR, and of a rootlesskit that was killed."""
    names = (f"podman-run-{uid}", f"containers-user-{uid}", "rootlesskit*")
    for path in (path for name in names for path in _TEMPORARY.glob(name)):
        if _owner(path) == uid:
            shutil.rmtree(path, ignore_errors=True)


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
