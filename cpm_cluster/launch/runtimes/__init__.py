"""Container runtimes, one small module each, named as the job file names them (with `_` for `-`).

Each has `run_options` (what the runtime is told, each option with its reason) and `run_argv` (the whole command
line of a node). Standard library only: the node agent calls them with the facts of its node, the dry run with
`SYMBOLIC_NODE`; there is no second code path.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, cast

from cpm_cluster.launch.plan import LaunchPlan, NodeFacts, Setting

SYMBOLIC_NODE = NodeFacts(
    name="$NODE_NAME",
    index=cast(int, "$NODE_RANK"),
    job_id="$SLURM_JOB_ID",
    attempt=cast(int, "$ATTEMPT"),
    master_address="$MASTER_ADDR",
    master_port="$MASTER_PORT",
    gpu_uuids=("$GPU_UUIDS",),
    environment_file="$NODE_DIR/environment",
    container_id_file="$NODE_DIR/container.id",
)
"""Stands for any node where a command line is only shown: names in place of values."""


def run_options(plan: LaunchPlan, node: NodeFacts) -> tuple[Setting, ...]:
    """What the plan's runtime is told on this node, option by option."""
    found: tuple[Setting, ...] = _module(plan.runtime).run_options(plan, node)
    return found


def run_argv(plan: LaunchPlan, node: NodeFacts) -> list[str]:
    """The command line that the plan's runtime runs on this node."""
    argv: list[str] = _module(plan.runtime).run_argv(plan, node)
    return argv


def shell_argv(plan: LaunchPlan, node: NodeFacts) -> list[str]:
    """The command line of an interactive shell in the same surroundings."""
    argv: list[str] = _module(plan.runtime).shell_argv(plan, node)
    return argv


def _module(runtime: str) -> Any:
    return import_module(f"{__name__}.{runtime.replace('-', '_')}")
