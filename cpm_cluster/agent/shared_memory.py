"""/dev/shm as the ranks see it: inside a container it is a tmpfs of the container's own."""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
from typing import Any

HOSTS = "/dev/shm"
# By whom, from how its names begin: NCCL; torch's tensors between processes; multiprocessing's shared memory, arrays
# and semaphores; the OpenMP runtimes of LLVM and Intel; UCX.
PREFIXES = ("nccl-", "torch_", "psm_", "pymp-", "sem.", "__KMP", "ucx_")
MOST_FILES = 10_000
PATIENCE_S = 0.5


def seen_by(pid: int) -> dict[str, Any]:
    """The /dev/shm of a process: see `measured`.

    Raises:
        OSError: it cannot be looked at from here.
    """
    try:
        return measured(f"/proc/{pid}/root{HOSTS}")
    except PermissionError:
        # the container's root may be fuse-overlayfs, which lets nobody in from outside (podman#17081)
        return _seen_from_inside(pid)


def measured(folder: str) -> dict[str, Any]:
    """Size of a file system and what is used of it, bytes; its files by how their names begin, number and bytes."""
    room = os.statvfs(folder)
    return {
        "size_bytes": room.f_blocks * room.f_frsize,
        "used_bytes": (room.f_blocks - room.f_bfree) * room.f_frsize,
        "files": _by_prefix(folder),
    }


def _by_prefix(folder: str) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    with os.scandir(folder) as entries:
        for _, entry in zip(range(MOST_FILES), entries):
            try:
                size = entry.stat(follow_symlinks=False).st_blocks * 512
            except OSError:  # removed in this moment
                continue
            prefix = next((prefix for prefix in PREFIXES if entry.name.startswith(prefix)), "other")
            class_ = found.setdefault(prefix, {"files": 0, "bytes": 0})
            class_["files"] += 1
            class_["bytes"] += size
    return found


def _seen_from_inside(pid: int) -> dict[str, Any]:
    """As `seen_by`, by a child process that goes into the container's namespaces, which its user may."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, json.dumps(_from_inside(pid)).encode())
        finally:  # whatever happens, this process must not go on as a second agent
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        if not select.select([pipe], [], [], PATIENCE_S)[0]:
            os.kill(child, signal.SIGKILL)  # whoever reaps the agent's children collects it
            raise TimeoutError(0, "the container's file system does not answer")
        answer = json.loads(pipe.read() or b"{}")
    os.waitpid(child, 0)
    if "size_bytes" not in answer:
        raise PermissionError(0, str(answer.get("error", "Permission denied")))
    return dict(answer)


def _from_inside(pid: int) -> dict[str, Any]:
    """For a process with one thread, as setns(2) wants it, which is of no other use then."""
    try:
        namespaces = [os.open(f"/proc/{pid}/ns/{name}", os.O_RDONLY) for name in ("user", "mnt")]
        libc = ctypes.CDLL(None, use_errno=True)
        for namespace in namespaces:
            if libc.setns(namespace, 0) != 0:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return measured(HOSTS)
    except OSError as error:
        return {"error": error.strerror}
