"""Finding the ranks among real processes, and their memory."""

from __future__ import annotations

import os

import pytest
from processes import program, wait_for

from cpm_cluster.agent import ranks
from cpm_cluster.agent.process_tree import descendants, end_all
from cpm_cluster.agent.ranks import memory, of_program, on_this_machine, outermost

# a launcher, two ranks, the second with a worker that inherits its RANK
LAUNCHER = """
RANK=0 LOCAL_WORLD_SIZE=2 sleep 60 &
RANK=1 LOCAL_WORLD_SIZE=2 bash -c 'sleep 60 & sleep 60; true' &
echo ready; wait
"""
LOG_DIR = f"/logs-of-test-{os.getpid()}"


def found_in(root, log_dir=LOG_DIR, keep=lambda name: name == "RANK"):
    return of_program(log_dir, [root.pid, *descendants(root.pid)], keep)


@pytest.fixture
def launcher():
    with program(LAUNCHER, env={"CPM_LOG_DIR": LOG_DIR, "RANK": ""}) as root:
        wait_for(lambda: len(found_in(root)) == 5)
        yield root
        end_all(lambda: descendants(root.pid), 0)


def test_the_ranks_are_neither_their_launcher_nor_their_workers(launcher):
    first, second = ranks.ranks(reversed(found_in(launcher)))
    assert (first.rank, second.rank, first.ranks_per_node) == (0, 1, 2)
    assert first.parent == second.parent == launcher.pid
    assert memory(first)["processes"] == 1 and memory(second)["processes"] == 3
    (top,) = outermost(found_in(launcher))
    assert (top.pid, top.rank) == (launcher.pid, None)


def test_processes_of_another_node_or_attempt_are_not_ours(launcher):
    assert found_in(launcher, log_dir=LOG_DIR + "0") == []


def test_a_daemons_children_are_found_among_all_processes(launcher):
    found = of_program(LOG_DIR, on_this_machine(), lambda name: False)
    assert len(found) == 5 and not any(process.variables for process in found)


def test_only_the_variables_asked_for_are_kept(launcher):
    assert {frozenset(process.variables) for process in ranks.ranks(found_in(launcher))} == {frozenset({"RANK"})}


def test_a_rank_that_has_ended_is_not_there_although_nobody_has_waited_for_it(launcher):
    first, second = ranks.ranks(found_in(launcher))
    assert first.is_there and second.is_there
    os.kill(first.pid, 9)
    wait_for(lambda: not first.is_there)
    assert second.is_there
    assert [rank.rank for rank in ranks.ranks(found_in(launcher))] == [1]


HOLDER = """
import mmap, time
private = bytearray(b"x" * (40 << 20))
shared = mmap.mmap(-1, 24 << 20)
shared.write(b"x" * (24 << 20))
print("ready", flush=True)
time.sleep(60)
"""


def test_memory_of_a_rank_all_of_it_and_what_is_shared():
    with program(HOLDER, language="python", env={"CPM_LOG_DIR": LOG_DIR, "RANK": "7"}) as root:
        (rank,) = ranks.ranks(found_in(root))
        found = memory(rank)
    assert (found["rank"], found["pid"]) == (7, root.pid)
    assert 24 << 20 <= found["shm_bytes"] < 25 << 20
    assert 64 << 20 <= found["rss_bytes"] < 120 << 20
    assert memory(rank)["rss_bytes"] == 0
