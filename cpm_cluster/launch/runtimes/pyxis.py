"""Pyxis/enroot: the container is an option of srun itself, so that a node runs the bare program inside it."""

from __future__ import annotations

from typing import Iterable, Iterator

from cpm_cluster.launch.plan import LaunchPlan, Mount, NodeFacts, Setting
from cpm_cluster.launch.program import program_argv
from cpm_cluster.launch.runtimes.docker import workdir_setting

AGENT_PYTHON = "python3"  # the image's: srun starts the node agent inside the container


def run_options(plan: LaunchPlan, node: NodeFacts) -> tuple[Setting, ...]:
    """None on the node: see `step_options`."""
    return ()


def step_options(image: str, mounts: Iterable[Mount], workdir: str, workdir_set_by: str) -> Iterator[Setting]:
    """The container options of the batch script's srun (pyxis README, "Usage")."""
    yield from shell_options(image, mounts)
    yield workdir_setting("container-workdir", workdir, workdir_set_by)


def shell_options(image: str, mounts: Iterable[Mount]) -> Iterator[Setting]:
    """The container options of an interactive srun."""
    why = "the tag of the job's image, which enroot imports from the node's docker daemon"
    yield Setting("container-image", f"dockerd://{image}", "computed", why)
    texts = [f"{m.source}:{m.target}" + (":ro" if m.read_only else "") for m in mounts if is_mountable(m)]
    if texts:
        yield Setting("container-mounts", ",".join(texts), "computed", "the run directory, your mounts and the data")
    why = "Python packages in your home must not shadow the image's"
    yield Setting("no-container-mount-home", None, "computed", why)


def is_mountable(mount: Mount) -> bool:
    """Pyxis splits its list at commas and colons, and knows no quotes."""
    return not any(c in mount.source + mount.target for c in ",:")


def run_argv(plan: LaunchPlan, node: NodeFacts) -> list[str]:
    """The program: srun has entered the container already."""
    return program_argv(plan, node)


def shell_argv(plan: LaunchPlan, node: NodeFacts) -> list[str]:
    """A shell: srun has entered the container already."""
    return ["bash"]
