"""The folder that holds everything of the sandbox: made, held by one process at a time, removed."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from cpm_cluster.sandbox.mounts import below
from cpm_cluster.sandbox.state import Sandbox, SandboxError

MARK = ".cpm-sandbox"
# a socket's path has at most 108 bytes, and the containers put theirs below this folder, too
LONGEST_ROOT = 40


def is_ours(state: Sandbox) -> bool:
    """Whether `up` has made this folder."""
    return (state.root / MARK).is_file()


def make_root(state: Sandbox) -> None:
    """The folder and its mark.

    Raises:
        SandboxError: the path is unfit, or the folder is someone else's.
    """
    if not state.root.is_absolute() or len(str(state.root)) > LONGEST_ROOT:
        raise SandboxError(f"{state.root}: the folder must be an absolute path of at most {LONGEST_ROOT} bytes")
    if is_ours(state):
        return
    if state.root.exists() and (not state.root.is_dir() or any(state.root.iterdir())):
        raise SandboxError(f"{state.root} is there already, and is no sandbox: name another folder with --root")
    claim(state)


def claim(state: Sandbox) -> None:
    """Make the folder ours."""
    state.root.mkdir(parents=True, exist_ok=True)
    state.root.chmod(0o755)
    (state.root / MARK).write_text("cpm sandbox down removes this folder\n")


@contextmanager
def held(state: Sandbox) -> Iterator[None]:
    """Keep other `up` and `down` away from the folder, which must be there."""
    descriptor = os.open(state.root, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SandboxError(f"another cpm sandbox works on {state.root} just now") from None
    else:
        yield
    finally:
        os.close(descriptor)


def make(state: Sandbox) -> None:
    """The folders below, and munge's key; the daemons of other users need their own."""
    for path in (state.etc, state.run, state.log, state.bin, state.shared, state.home.parent, state.head.folder):
        path.mkdir(exist_ok=True)
    state.shared.chmod(0o1777)
    for node in state.nodes:
        node.spool.mkdir(parents=True, exist_ok=True)
    for path, owner, mode in (
        (state.root / "slurmctld", "slurm", 0o700),
        (state.root / "mariadb", "mysql", 0o700),
        (state.database_socket.parent, "mysql", 0o755),
        (state.munge_socket.parent, "munge", 0o755),
        (state.run / "slurm", "slurm", 0o755),
    ):
        path.mkdir(exist_ok=True)
        path.chmod(mode)
        shutil.chown(path, owner, owner)
    if not state.munge_key.exists():
        state.munge_key.touch(mode=0o400)
        state.munge_key.write_bytes(secrets.token_bytes(64))
        shutil.chown(state.munge_key, "munge", "munge")


def remove_root(state: Sandbox) -> None:
    """Remove the folder; the mark last, so that what is left of a failure is still known as ours.

    Raises:
        SandboxError: something is mounted below it.
    """
    mounted = below(state.root)
    if mounted:
        raise SandboxError(f"{mounted[0]} is still mounted; umount it, then: cpm sandbox down")
    for path in state.root.iterdir():
        if path.name != MARK:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    shutil.rmtree(state.root)
