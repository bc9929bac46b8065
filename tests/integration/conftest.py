"""Fixtures of real runs. Every test ends with nobody left: whatever a run started, however it hides, is found here."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from local_runs import LocalRuns, Terminal, all_processes, command_line, is_alive, parent_of
from sandbox_here import reason_against

from cpm_cluster.agent import process_tree
from cpm_cluster.sandbox import network, sandbox
from cpm_cluster.sandbox.state import Sandbox

PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
# The last process of a run may still be on its way out when the run's records say that it has ended.
SETTLING_S = 30.0
# A test waits several times, and each wait fails by itself after five minutes, with what it waited for.
TIMEOUT_S = 1200


@pytest.fixture(scope="session")
def machine():
    """One that can have a sandbox."""
    if reason_against():
        pytest.skip(reason_against())


@pytest.fixture(scope="session")
def cluster(machine):
    """The sandbox with its containers: one that is up already is used and stays, else one for all these tests."""
    state = Sandbox()
    was_up = network.is_up(state)
    sandbox.up(state, install=False, with_containers=True)
    yield state
    if not was_up:
        sandbox.down(state, keep_files=False, purge=False)


def pytest_collection_modifyitems(items):
    """What looks at a machine without a sandbox comes before what brings one up; both are marked `sandbox`."""
    for item in items:
        if "machine" in item.fixturenames:
            item.add_marker("sandbox")
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.timeout(TIMEOUT_S))
    items.sort(key=lambda item: item.get_closest_marker("without_sandbox") is None)


def descendants() -> list[int]:
    """Everything alive below this process, orphans included."""
    parents = {pid: parent_of(pid) for pid in all_processes()}

    def is_below(pid: int) -> bool:
        while pid > 1:
            pid = parents.get(pid, 0)
            if pid == os.getpid():
                return True
        return False

    return [pid for pid in parents if is_below(pid) and is_alive(pid)]


def reap() -> None:
    """Collect orphans that have ended."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return


@pytest.fixture
def runs(tmp_path):
    """A user's folders; fails the test when a process is left, also one that has hidden from its run."""
    prctl = ctypes.CDLL(None).prctl
    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    before = set(descendants())
    made = LocalRuns(tmp_path)
    yield made
    left = _left_after(SETTLING_S, before)
    described = [f"{pid}: {command_line(pid)[:200]}" for pid in left]
    process_tree.send(left, signal.SIGKILL)
    _left_after(SETTLING_S, before)
    prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
    assert not described, "processes are left: " + "; ".join(described)


def _left_after(seconds: float, before: set[int]) -> list[int]:
    deadline = time.monotonic() + seconds
    while (left := [pid for pid in descendants() if pid not in before]) and time.monotonic() < deadline:
        time.sleep(0.05)
    reap()
    return left


@pytest.fixture
def terminal(runs):
    """Open programs on a pseudo-terminal: `terminal("cpm-submit", job)`."""
    opened = []

    def open_terminal(program, *words, **options):
        opened.append(Terminal(runs, program, *words, **options))
        return opened[-1]

    yield open_terminal
    for each in opened:
        each.kill()
