"""Podman: docker's command line without a daemon, so that the container is a descendant of the step."""

from __future__ import annotations

from dataclasses import replace
from typing import Iterable, Iterator

from cpm_cluster.launch.plan import LaunchPlan, NodeFacts, Setting
from cpm_cluster.launch.program import program_argv
from cpm_cluster.launch.runtimes import docker

PROGRAM = "podman"


def run_options(plan: LaunchPlan, node: NodeFacts) -> tuple[Setting, ...]:
    """Docker's options, with podman's own words for GPUs and logs."""
    return (*_podman_only(), *_translated(docker.run_options(plan, node), node))


def run_argv(plan: LaunchPlan, node: NodeFacts) -> list[str]:
    """`podman run … IMAGE PROGRAM`."""
    return docker.container_argv(PROGRAM, plan, run_options(plan, node), program_argv(plan, node))


def shell_argv(plan: LaunchPlan, node: NodeFacts) -> list[str]:
    """`podman run --interactive --tty … IMAGE bash`."""
    settings = (*_podman_only(), *_translated(docker.shell_options(plan, node), node))
    return docker.container_argv(PROGRAM, plan, settings, ["bash"])


def _podman_only() -> Iterator[Setting]:
    why = "conmon stays in the Slurm step's cgroup: a scope of its own needs a login session, which a job lacks"
    yield Setting("cgroups", "no-conmon", "computed", why)


def _translated(settings: Iterable[Setting], node: NodeFacts) -> Iterator[Setting]:
    for setting in settings:
        if setting.name == "gpus":
            why = "one CDI device for each GPU of this step (podman-run(1), --device)"
            for uuid in node.gpu_uuids:
                yield Setting("device", f"nvidia.com/gpu={uuid}", "computed", why)
        elif setting.name == "log-driver":
            yield replace(setting, value="k8s-file", why="podman's file driver; the agent keeps the whole output")
        else:
            yield setting
