"""Pyxis/enroot: the container is an option of srun itself, so that a node runs the bare program inside it."""

from __future__ import annotations

from typing import Iterator

from cpm_cluster.launch.plan import LaunchPlan, Mount, NodeFacts, Setting
from cpm_cluster.launch.program import program_argv


def run_options(plan: LaunchPlan, node: NodeFacts) -> tuple[Setting, ...]:
    """None on the node: see `step_options`."""
    return ()


def step_options(image: str, mounts: tuple[Mount, ...], workdir: str) -> Iterator[Setting]:
    """The container options of srun (pyxis README, "Usage")."""
    yield Setting("container-image", f"dockerd://{image}", "job", "enroot imports it from the node's docker daemon")
    texts = (f"{m.source}:{m.target}" + (":ro" if m.read_only else "") for m in mounts)
    yield Setting("container-mounts", ",".join(texts), "computed", "the run directory, your mounts and the data")
    yield Setting("container-workdir", workdir, "computed", "the snapshot of your code")
    yield Setting(
        "no-container-mount-home", None, "computed", "Python packages in your home must not shadow the image's"
    )


def run_argv(plan: LaunchPlan, node: NodeFacts) -> list[str]:
    """The program: srun has entered the container already."""
    return program_argv(plan, node)


def shell_argv(plan: LaunchPlan, node: NodeFacts) -> list[str]:
    """A shell: srun has entered the container already."""
    return ["bash"]
