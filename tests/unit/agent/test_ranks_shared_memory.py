"""/dev/shm of a process, here the machine's own, and by whom its files are."""

from __future__ import annotations

import os
import shutil
import subprocess
import time

import pytest
from processes import program

from cpm_cluster.agent import shared_memory
from cpm_cluster.agent.shared_memory import measured, seen_by


@pytest.fixture
def folder(tmp_path):
    for name, size in (
        ("nccl-AbCdEf", 8192),
        ("nccl-000001", 4096),
        ("torch_12_34", 4096),
        ("sem.mp-x", 1),
        ("__KMP_REGISTERED_LIB_9", 0),
        ("anything", 4096),
        ("not-nccl-1", 0),
    ):
        with (tmp_path / name).open("wb") as file:
            if size:
                os.posix_fallocate(file.fileno(), 0, size)
    return tmp_path


def test_files_are_counted_by_how_their_names_begin(folder):
    found = measured(str(folder))
    assert {prefix: each["files"] for prefix, each in found["files"].items()} == {
        "nccl-": 2,
        "torch_": 1,
        "sem.": 1,
        "__KMP": 1,
        "other": 2,
    }
    assert found["files"]["nccl-"]["bytes"] == 12288
    assert found["size_bytes"] == shutil.disk_usage(folder).total


def test_a_hole_takes_no_room_nor_does_a_link(tmp_path):
    with (tmp_path / "nccl-sparse").open("wb") as file:
        file.truncate(1 << 30)
    (tmp_path / "nccl-link").symlink_to("/proc/self/exe")
    assert measured(str(tmp_path))["files"]["nccl-"] == {"files": 2, "bytes": 0}


def test_a_folder_of_very_many_files_is_not_read_to_the_end(folder, monkeypatch):
    monkeypatch.setattr(shared_memory, "MOST_FILES", 3)
    assert sum(each["files"] for each in measured(str(folder))["files"].values()) == 3


def test_a_process_that_sees_the_machines_own():
    room = os.statvfs("/dev/shm")
    found = seen_by(os.getpid())
    assert found["size_bytes"] == room.f_blocks * room.f_frsize
    assert 0 <= found["used_bytes"] <= found["size_bytes"]


def test_a_process_that_has_ended():
    with pytest.raises(FileNotFoundError):
        seen_by(1 << 30)


INSIDE = """
mount -t tmpfs -o size=5m tmpfs /dev/shm && head -c 8192 /dev/zero > /dev/shm/nccl-inside && echo ready && sleep 60
"""
NAMESPACES = ("unshare", "--user", "--map-root-user", "--mount")
WITHOUT_NAMESPACES = subprocess.run([*NAMESPACES, "true"], stderr=subprocess.DEVNULL).returncode != 0


@pytest.fixture
def closed_root(monkeypatch):
    """The root of a container cannot be entered from outside, as that of fuse-overlayfs (podman#17081)."""
    really = shared_memory.measured

    def refuse(folder):
        if folder.startswith("/proc/"):
            raise PermissionError(13, "Permission denied")
        return really(folder)

    monkeypatch.setattr(shared_memory, "measured", refuse)


@pytest.mark.skipif(WITHOUT_NAMESPACES, reason="no user namespaces for this user here")
def test_where_the_containers_root_is_closed_it_is_measured_from_inside(closed_root):
    with program(f"exec {' '.join(NAMESPACES)} sh -c '{INSIDE}'") as container:
        found = seen_by(container.pid)
    assert found == {"size_bytes": 5 << 20, "used_bytes": 8192, "files": {"nccl-": {"files": 1, "bytes": 8192}}}


def test_where_nobody_may_enter_the_refusal_stays_and_no_process_is_left(closed_root):
    with pytest.raises(PermissionError):
        seen_by(1 << 30)
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_a_container_whose_file_system_hangs_holds_nobody_up(closed_root, monkeypatch):
    monkeypatch.setattr(shared_memory, "_from_inside", lambda pid: time.sleep(60))
    started = time.monotonic()
    with pytest.raises(TimeoutError, match="does not answer"):
        seen_by(os.getpid())
    assert time.monotonic() - started < 5
    os.waitpid(-1, 0)
