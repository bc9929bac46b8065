"""All nodes meet at the first one before anything is started: who is missing is named, not waited for to the end.

Node 0 listens; each other node says who it is and gets the port that the ranks will use. What is asserted here (every
node is there once, and is of this run and attempt) BMTrain would not notice: it trains alone.
"""

from __future__ import annotations

import json
import socket
import time
from dataclasses import dataclass
from typing import Any, Sequence

from cpm_cluster.agent.surroundings import NodeError
from cpm_cluster.launch.plan import LaunchPlan, NodeFacts

PORTS_TRIED = 8
PATIENCE_S = 180.0
MESSAGE_BYTES = 4096


@dataclass(frozen=True)
class Gathered:
    """The port for the ranks, and how far this node's clock is from node 0's (seconds, 0 on node 0)."""

    port: int
    clock_skew_s: float


def gather(plan: LaunchPlan, node: NodeFacts, names: Sequence[str], patience_s: float = PATIENCE_S) -> Gathered:
    """Meet the other nodes; collective over the nodes of a run.

    Args:
        plan: of the run.
        node: this one.
        names: of all nodes in the order of their numbers, to say who is missing.
        patience_s: how long to wait for the last of them.

    Raises:
        NodeError: a node does not come, node 0 cannot be reached, or no port is free.
    """
    if plan.nodes == 1:
        with _listen(node.master_address, int(node.master_port)) as door:
            return Gathered(int(door.getsockname()[1]), 0.0)
    return _receive(plan, node, names, patience_s) if node.index == 0 else _report(plan, node, patience_s)


def _listen(address: str, first_port: int) -> socket.socket:
    """A listening socket on the first free port of several."""
    for port in range(first_port, first_port + PORTS_TRIED):
        door = socket.socket()
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            door.bind((address, port))
            door.listen(256)
            return door
        except OSError:
            door.close()
    raise NodeError(
        f"ports {first_port} to {first_port + PORTS_TRIED - 1} of {address} are all taken; another job, or a process"
        " that an earlier one left: ss -ltnp shows which"
    )


def _receive(plan: LaunchPlan, node: NodeFacts, names: Sequence[str], patience_s: float) -> Gathered:
    deadline = time.monotonic() + patience_s
    seen = {0: node.name}
    with _listen(node.master_address, int(node.master_port)) as door:
        port = int(door.getsockname()[1])
        while len(seen) < plan.nodes:
            door.settimeout(max(0.1, deadline - time.monotonic()))
            try:
                guest, _ = door.accept()
            except OSError:
                raise _missing(plan, node, names, set(seen), patience_s) from None
            with guest:
                said = _hear(guest)
                if said.get("run") == plan.run_id and said.get("attempt") == node.attempt:
                    seen[int(said["index"])] = str(said["name"])
                    _say(guest, {"run": plan.run_id, "port": port, "time": time.time()})
                    _hear(guest)  # the guest closes first, so that no port of ours lingers in TIME_WAIT
    return Gathered(port, 0.0)


def _missing(plan: LaunchPlan, node: NodeFacts, names: Sequence[str], seen: set[int], patience_s: float) -> NodeError:
    """Who did not come is to blame; where nobody came to meet several, it is node 0."""
    missing = [names[index] for index in range(plan.nodes) if index not in seen]
    text = (
        f"{len(missing)} of {plan.nodes} nodes did not reach {node.name} ({node.master_address}) in {patience_s:.0f} s:"
        f" {', '.join(missing)}"
    )
    return NodeError(text, [node.name] if len(missing) == plan.nodes - 1 > 1 else missing)


def _report(plan: LaunchPlan, node: NodeFacts, patience_s: float) -> Gathered:
    deadline = time.monotonic() + patience_s
    error = "nothing listens there"
    first_port = int(node.master_port)
    while time.monotonic() < deadline:
        for port in range(first_port, first_port + PORTS_TRIED):
            try:
                with socket.create_connection((node.master_address, port), timeout=5.0) as host:
                    asked = time.time()
                    _say(host, {"run": plan.run_id, "attempt": node.attempt, "index": node.index, "name": node.name})
                    said = _hear(host)
                    if said.get("run") == plan.run_id:
                        return Gathered(int(said["port"]), (asked + time.time()) / 2 - float(said["time"]))
            except OSError as refused:
                error = refused.strerror or str(refused)
        time.sleep(0.2)
    raise NodeError(
        f"node 0 ({node.master_address}:{first_port}) cannot be reached from {node.name} in {patience_s:.0f} s: {error}"
    )


def _say(connection: socket.socket, message: dict[str, Any]) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def _hear(connection: socket.socket) -> dict[str, Any]:
    """One line of JSON; an empty message when the other side has closed, or is somebody else."""
    connection.settimeout(5.0)
    heard = b""
    try:
        while not heard.endswith(b"\n") and len(heard) < MESSAGE_BYTES:
            piece = connection.recv(MESSAGE_BYTES)
            if not piece:
                return {}
            heard += piece
        message = json.loads(heard)
    except (OSError, ValueError):
        return {}
    return message if isinstance(message, dict) else {}
