"""What the agent finds on its node: the facts that no plan can know."""

from __future__ import annotations

import os
import platform
import socket
import stat
import subprocess
from pathlib import Path
from resource import RLIM_INFINITY, RLIMIT_MEMLOCK, RLIMIT_NOFILE, RLIMIT_STACK, getrlimit
from typing import Iterable, Mapping

from cpm_cluster.launch.plan import WANTED_ULIMITS, LaunchPlan, NodeFacts
from cpm_cluster.runs.layout import RunLayout

SECRETS_FILE = Path("~/.config/cpm-cluster/secrets.env")
LOOPBACK = "127.0.0.1"


class NodeError(Exception):
    """This node cannot run the job; the message says what is wrong and what to do.

    `blamed` names the nodes at fault, without which the job may run; none where it would fail on any other, too.
    """

    def __init__(self, message: str, blamed: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.blamed = tuple(blamed)


def node_facts(files: RunLayout, environment: Mapping[str, str], attempt: int | None = None) -> NodeFacts:
    """The facts of this node but for its GPUs, for an attempt (default: a new one); makes the attempt's folder."""
    index = int(environment.get("SLURM_NODEID", "0"))
    attempt = int(environment.get("CPM_ATTEMPT", attempt or next_attempt(files)))
    folder = files.node_dir(attempt, index)
    folder.mkdir(parents=True, exist_ok=True)
    return NodeFacts(
        name=environment.get("SLURMD_NODENAME") or platform.node(),
        index=index,
        job_id=environment.get("SLURM_JOB_ID") or environment.get("SUBMITIT_LOCAL_JOB_ID", ""),
        attempt=attempt,
        master_address=environment.get("CPM_MASTER_ADDR", LOOPBACK),
        master_port=environment.get("CPM_MASTER_PORT") or str(free_port()),
        gpu_uuids=(),
        environment_file=str(folder / "environment"),
        container_id_file=str(folder / "container.id"),
        ulimits=allowed_ulimits(),
    )


def allowed_ulimits() -> tuple[str, ...]:
    """The limits that a container is given: as wanted, or the node's hard limit, which nobody but root exceeds."""
    if os.geteuid() == 0:
        return WANTED_ULIMITS
    allowed = []
    for name, number in (("memlock", RLIMIT_MEMLOCK), ("stack", RLIMIT_STACK), ("nofile", RLIMIT_NOFILE)):
        wanted = next(int(limit.split("=")[1]) for limit in WANTED_ULIMITS if limit.startswith(name))
        hard = getrlimit(number)[1]
        exceeds = hard != RLIM_INFINITY and (wanted == -1 or wanted > hard)
        allowed.append(f"{name}={hard if exceeds else wanted}")
    return tuple(allowed)


def newest_attempt(files: RunLayout) -> int:
    """Attempts count from 1, and each is a folder; 0 before the first."""
    numbers = [int(path.name[8:]) for path in files.root.glob("attempt-*") if path.name[8:].isdigit()]
    return max(numbers, default=0)


def next_attempt(files: RunLayout) -> int:
    """1 for the first."""
    return newest_attempt(files) + 1


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def gpu_uuids(plan: LaunchPlan, node: str) -> tuple[str, ...]:
    """UUIDs of this step's GPUs, from `nvidia-smi -L`: `GPU 0: NVIDIA A100 (UUID: GPU-…)`.

    Raises:
        NodeError: they are not as many as in the plan.
    """
    if not plan.gpus_per_node:
        return ()
    try:
        done = subprocess.run(["nvidia-smi", "-L"], stdout=subprocess.PIPE, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        raise NodeError(f"nvidia-smi -L fails on {node}: {error}; tell the admin, exclude the node", [node]) from error
    lines = done.stdout.decode("utf-8", "replace").splitlines()
    found = tuple(line.split("UUID: ")[1].rstrip(") ") for line in lines if line.startswith("GPU") and "UUID: " in line)
    if len(found) != plan.gpus_per_node:
        raise NodeError(
            f"nvidia-smi lists {len(found)} GPUs in this step, the plan has {plan.gpus_per_node}:"
            " a GPU has failed, or Slurm does not confine devices (ConstrainDevices)",
            [node],
        )
    return found


def secret_values(names: tuple[str, ...], path: Path) -> dict[str, str]:
    """The named variables of a KEY=VALUE file that only its owner may read.

    Raises:
        NodeError: a name is missing, or others can read the file.
    """
    if not names:
        return {}
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise NodeError(
            f"secrets {', '.join(names)}: {path}: {error.strerror}; write NAME=VALUE lines there"
        ) from error
    if mode & 0o077:
        raise NodeError(f"{path} is readable by others (mode {mode:o}); chmod 600 it")
    pairs = dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))
    missing = [name for name in names if name not in pairs]
    if missing:
        raise NodeError(f"{path} has no line for {', '.join(missing)}")
    return {name: pairs[name] for name in names}


def inherited_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The surroundings without what would mislead a launcher: another launcher's ranks, submitit's own."""
    misleading = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PYTHONPATH")
    prefixes = ("SUBMITIT_", "TORCHELASTIC_", "PET_", "GROUP_", "ROLE_")
    return {k: v for k, v in environment.items() if k not in misleading and not k.startswith(prefixes)}


def home_file(path: Path) -> Path:
    """A path below the user's home, as this node knows it."""
    return Path(os.path.expanduser(str(path)))
