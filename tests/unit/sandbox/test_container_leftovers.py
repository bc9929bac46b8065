"""Processes that containers leave are found by what they are, not by what wrote their number down."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from cpm_cluster.sandbox.container_leftovers import container_processes, daemon_processes, processes_of, remove_files_of


@pytest.fixture
def sleeper():
    """Start processes that sleep, with these words on their command line and this environment."""
    started = []

    def start(*words, **variables):
        # the line of output says that the new program is in place
        argv = [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)", *words]
        process = subprocess.Popen(argv, env=variables, stdout=subprocess.PIPE)
        process.stdout.readline()
        started.append(process)
        return process.pid

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_daemon_is_known_by_the_folder_of_its_socket(tmp_path, sleeper):
    ours = sleeper("-address", f"{tmp_path}/run/containerd.sock")
    sleeper("-address", f"{tmp_path}/running/containerd.sock")
    assert daemon_processes(tmp_path / "run") == {ours}


def test_all_processes_of_a_user_are_found_and_none_of_others(sleeper):
    ours = sleeper()
    me = range(os.getuid(), os.getuid() + 1)
    assert ours in processes_of([me])
    assert processes_of([]) == set()
    assert processes_of([range(4_000_000_000, 4_000_000_001)]) == set()


def test_temporary_files_of_a_user_go_and_what_is_linked_stays(tmp_path):
    kept, temporary = tmp_path / "kept", tmp_path / "temporary"
    (kept / "inner").mkdir(parents=True)
    (temporary / "folder" / "inner").mkdir(parents=True)
    (temporary / "segment").write_text("")
    (temporary / "link").symlink_to(kept)
    remove_files_of([range(os.getuid() + 1, os.getuid() + 9)], (temporary,))
    assert len(list(temporary.iterdir())) == 3
    remove_files_of([range(os.getuid(), os.getuid() + 1)], (temporary,))
    assert list(temporary.iterdir()) == []
    assert (kept / "inner").is_dir()


def test_an_ordinary_process_is_in_no_container(tmp_path, sleeper):
    sleeper(f"{tmp_path}/docker")
    assert container_processes(tmp_path) == set()
