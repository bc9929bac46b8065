"""What the container is given: shared memory, mounts, environment variables."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterator
from pathlib import PurePosixPath

from cpm_cluster.specs.checks.rules import Finding, reads
from cpm_cluster.specs.job import JobSpec
from cpm_cluster.specs.problems import quoted
from cpm_cluster.specs.values import format_size

HIDDEN_BY_MOUNTS = frozenset(
    "/ /bin /boot /dev /dev/shm /etc /lib /lib32 /lib64 /opt /proc /run /sbin /sys /usr /usr/bin /usr/lib /var".split()
)
OWN_ENVIRONMENT = frozenset(
    "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK NODE_RANK MASTER_ADDR MASTER_PORT "
    "CUDA_VISIBLE_DEVICES PYTHONPATH".split()
)


@reads("container", "resources.shm")
def _shared_memory(spec: JobSpec) -> Iterator[Finding]:
    shm = spec.resources.shm_bytes
    if spec.container.ipc == "host" and shm is not None:
        yield (
            "container.ipc",
            f"host takes the node's /dev/shm as it is, so that resources.shm ({format_size(shm)}, set by"
            f" {spec.origins['resources.shm']}) has no effect; write ipc: private, or shm: null",
        )


@reads()
def _mounts(spec: JobSpec) -> Iterator[Finding]:
    places: dict[str, str] = {}
    for host, target in spec.mounts.items():
        path = f"mounts.{host}"
        inside, _, mode = target.partition(":")
        place = posixpath.normpath("/" + inside.lstrip("/"))
        if mode not in ("", "ro", "rw"):
            yield path, f"{quoted(target)} has the mode {quoted(mode)}; write :ro, or nothing"
        if any(c in host + inside for c in ',":'):
            yield path, "a path to mount may not hold a comma, a colon or a double quote"
        if ".." in PurePosixPath(host).parts or ".." in PurePosixPath(inside).parts:
            yield path, "a path to mount may not climb with '..'"
        elif place in HIDDEN_BY_MOUNTS:
            yield path, f"would hide {place} of the container; mount it somewhere else, such as /mnt/name"
        elif place in places:
            yield path, f"{place} is already the place of {places[place]}; mount it somewhere else"
        if host.startswith("~") and os.path.expanduser(host).startswith("~"):
            yield path, f"there is no home folder {host.split('/')[0]}"
        places[place] = host


@reads()
def _environment(spec: JobSpec) -> Iterator[Finding]:
    for name in spec.env:
        if owner := _owner(name):
            yield f"env.{name}", f"is set by {owner}; remove it"
        if name in spec.secrets:
            yield f"env.{name}", "is also in secrets, whose values stay out of the job file; remove it here"
    for index, name in enumerate(spec.secrets):
        if owner := _owner(name):
            yield f"secrets[{index}]", f"{name} is set by {owner}; remove it"


def _owner(variable: str) -> str | None:
    """Who sets an environment variable that is not a job's to set."""
    if variable.startswith(("SLURM_", "SBATCH_")):
        return "Slurm"
    own = variable in OWN_ENVIRONMENT or variable.startswith("CPM_")
    return "cpm-cluster, for each rank" if own else None
