"""All nodes meet on loopback, as threads of this process."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from cpm_cluster.agent.gathering import gather
from cpm_cluster.agent.surroundings import LOOPBACK, NodeError, free_port
from cpm_cluster.launch.plan import NodeFacts

NAMES = ["g2001", "g2002", "g2003", "g2004"]


@dataclass(frozen=True)
class AnyPlan:
    nodes: int
    run_id: str = "run-of-this-test"


def facts(index: int, port: int, attempt: int = 1) -> NodeFacts:
    return NodeFacts(f"g{2001 + index}", index, "7", attempt, LOOPBACK, str(port), (), "", "")


def gathered(plan: AnyPlan, nodes: list[NodeFacts], patience_s: float = 10.0):
    """What each node got: a Gathered, or a NodeError."""
    with ThreadPoolExecutor(len(nodes)) as threads:
        waiting = [threads.submit(gather, plan, node, NAMES[: plan.nodes], patience_s) for node in nodes]
        return [future.exception() or future.result() for future in waiting]


def test_every_node_gets_the_same_port_which_is_free_again():
    port = free_port()
    found = gathered(AnyPlan(4), [facts(index, port) for index in (2, 0, 3, 1)])
    assert {each.port for each in found} == {port}
    assert all(abs(each.clock_skew_s) < 1 for each in found)
    with socket.socket() as ranks:
        ranks.bind((LOOPBACK, port))


def test_a_port_that_is_taken_is_passed_over_by_all():
    with socket.socket() as other:
        other.bind((LOOPBACK, 0))
        other.listen()
        taken = other.getsockname()[1]
        first, second = gathered(AnyPlan(2), [facts(0, taken), facts(1, taken)])
    assert taken < first.port == second.port


def test_who_does_not_come_is_named():
    (error,) = gathered(AnyPlan(3), [facts(0, free_port())], patience_s=0.5)
    assert isinstance(error, NodeError)
    assert "2 of 3 nodes did not reach g2001" in str(error)
    assert str(error).endswith("g2002, g2003")


def test_who_is_missing_is_to_blame_and_where_all_are_it_is_node_0():
    (nobody_came,) = gathered(AnyPlan(3), [facts(0, free_port())], patience_s=0.3)
    port = free_port()
    one_is_missing = gathered(AnyPlan(3), [facts(0, port), facts(2, port)], patience_s=1.0)[0]
    assert (nobody_came.blamed, one_is_missing.blamed) == (("g2001",), ("g2002",))


def test_a_node_that_cannot_reach_node_0_says_so():
    port = free_port()
    (error,) = gathered(AnyPlan(2), [facts(1, port)], patience_s=0.5)
    assert isinstance(error, NodeError)
    assert f"node 0 ({LOOPBACK}:{port}) cannot be reached from g2002" in str(error)


def test_a_node_of_another_attempt_does_not_count():
    port = free_port()
    first, second = gathered(AnyPlan(2), [facts(0, port, attempt=2), facts(1, port, attempt=1)], patience_s=1.0)
    assert isinstance(first, NodeError) and str(first).endswith("g2002") and first.blamed == ("g2002",)
    assert isinstance(second, NodeError)


def test_a_node_alone_needs_nobody():
    port = free_port()
    assert gathered(AnyPlan(1), [facts(0, port)])[0].port == port


@pytest.mark.parametrize("noise", [b"GET / HTTP/1.0\r\n\r\n", b"\xff\xfe\n", b"[]\n", b""])
def test_whoever_else_calls_is_not_taken_for_a_node(noise):
    port = free_port()
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(gather, AnyPlan(2), facts(0, port), 10.0)
        stranger = _connected(port)
        stranger.sendall(noise)
        stranger.close()
        assert gather(AnyPlan(2), facts(1, port), 10.0).port == waiting.result().port


def _connected(port: int) -> socket.socket:
    while True:
        try:
            return socket.create_connection((LOOPBACK, port), timeout=5)
        except OSError:
            continue
