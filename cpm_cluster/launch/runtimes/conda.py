"""A conda environment on the nodes, without a container."""

from __future__ import annotations

from typing import Iterator

from cpm_cluster.launch.plan import LaunchPlan, NodeFacts, Setting
from cpm_cluster.launch.program import program_argv


def run_options(plan: LaunchPlan, node: NodeFacts) -> tuple[Setting, ...]:
    """Options of `conda run`."""
    return tuple(_options(plan))


def run_argv(plan: LaunchPlan, node: NodeFacts) -> list[str]:
    """`conda run … PROGRAM`."""
    return [*_prefix(plan), *program_argv(plan, node)]


def shell_argv(plan: LaunchPlan, node: NodeFacts) -> list[str]:
    """`conda run … bash`."""
    return [*_prefix(plan), "bash"]


def _options(plan: LaunchPlan) -> Iterator[Setting]:
    environment = plan.conda_environment or ""
    name = "prefix" if "/" in environment else "name"
    yield Setting(name, environment, "cluster", "the environment that the cluster file names")
    yield Setting("no-capture-output", None, "computed", "conda keeps all output to the end otherwise")


def _prefix(plan: LaunchPlan) -> list[str]:
    # `conda run` knows its value options only as two words
    argv = ["conda", "run"]
    for setting in _options(plan):
        argv += [f"--{setting.name}"] if setting.value is None else [f"--{setting.name}", setting.value]
    return argv
