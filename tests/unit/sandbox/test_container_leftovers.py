"""Processes that containers leave are found by what they are, not by what wrote their number down."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from cpm_cluster.sandbox.container_leftovers import container_processes, daemon_processes, user_processes


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


def test_a_process_of_the_user_is_known_by_command_line_or_environment(tmp_path, sleeper):
    by_argument = sleeper(f"--data-root={tmp_path}/docker")
    by_variable = sleeper(HOME=f"{tmp_path}/home")
    sleeper(HOME="/nowhere")
    assert user_processes(tmp_path, os.getuid()) == {by_argument, by_variable}


def test_processes_of_other_users_are_left_alone(tmp_path, sleeper):
    sleeper(f"--data-root={tmp_path}/docker")
    assert user_processes(tmp_path, os.getuid() + 1) == set()


def test_an_ordinary_process_is_in_no_container(tmp_path, sleeper):
    sleeper(f"{tmp_path}/docker")
    assert container_processes(tmp_path) == set()
