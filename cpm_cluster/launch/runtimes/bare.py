"""No container: the program runs with the Python that the cluster file names."""

from __future__ import annotations

from cpm_cluster.launch.plan import LaunchPlan, NodeFacts, Setting
from cpm_cluster.launch.program import program_argv


def run_options(plan: LaunchPlan, node: NodeFacts) -> tuple[Setting, ...]:
    """There are none."""
    return ()


def run_argv(plan: LaunchPlan, node: NodeFacts) -> list[str]:
    """The program itself."""
    return program_argv(plan, node)


def shell_argv(plan: LaunchPlan, node: NodeFacts) -> list[str]:
    """A shell on the node."""
    return ["bash"]
