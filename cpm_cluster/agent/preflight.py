"""Is this node fit for the job? Found out in seconds, before an image is loaded or a rank started.

Each check yields findings; an error ends the attempt and names the node, a warning is recorded.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, Mapping

from cpm_cluster.agent.rootless_docker import data_root_base
from cpm_cluster.agent.surroundings import NodeError
from cpm_cluster.launch.plan import LaunchPlan, NodeFacts

LOCKED_BYTES = 64 << 20
LEAST_FREE_BYTES = 1 << 30
# docker keeps the archive's layers unpacked beside what it reads
UNPACKED_PER_ARCHIVE = 2.5
MOST_CLOCK_SKEW_S = 5.0
NVIDIA_SMI_PATIENCE_S = 30.0


@dataclass(frozen=True)
class Finding:
    """`fatal`: the job cannot run here."""

    check: str
    fatal: bool
    text: str


def preflight(plan: LaunchPlan, node: NodeFacts, environment: Mapping[str, str]) -> list[Finding]:
    """What is wrong with this node for this plan."""
    found = [*_foreign_processes(plan, node), *_driver(plan), *_compute_capability(plan), *_memlock(plan)]
    return [*found, *_shared_memory(plan), *_disk(plan), *_time_left(plan, environment)]


def refuse(node: NodeFacts, findings: list[Finding]) -> None:
    """Raise NodeError where a finding is fatal."""
    fatal = [finding.text for finding in findings if finding.fatal]
    if fatal:
        raise NodeError(f"{node.name} cannot run this job: " + "; ".join(fatal), [node.name])


def _foreign_processes(plan: LaunchPlan, node: NodeFacts) -> Iterator[Finding]:
    """GPUs of this step that somebody else's process is on."""
    if not node.gpu_uuids:
        return
    lines = _nvidia_smi("--query-compute-apps=gpu_uuid,pid,process_name")
    if lines is None:
        yield Finding("gpus", False, "nvidia-smi fails or does not answer: whether its GPUs are free is not known")
    for line in lines or ():
        uuid, pid, name = (part.strip() for part in (line.split(",", 2) + ["", ""])[:3])
        if uuid in node.gpu_uuids:
            yield Finding("gpus", True, f"process {pid} ({name}) is on GPU {uuid} already; tell the admin")


def _driver(plan: LaunchPlan) -> Iterator[Finding]:
    """The NVIDIA driver against what the image's CUDA needs."""
    wanted = plan.container.min_driver if plan.container else None
    if not plan.gpus_per_node or not wanted:
        return
    found = next(iter(_nvidia_smi("--query-gpu=driver_version") or ()), "").strip()
    if _numbers(found) and _numbers(found) < _numbers(wanted):
        yield Finding("driver", True, f"its NVIDIA driver is {found}, the image needs {wanted} or newer")


def _compute_capability(plan: LaunchPlan) -> Iterator[Finding]:
    """The cards that are really there against the CUDA code in the image.

    Machine code runs within a major version from its own minor upwards, PTX on anything newer (CUDA C++ Programming
    Guide, "Compute Capability Compatibility"). Drivers before 510 do not tell: then it is left to the ranks.
    """
    container = plan.container
    if not plan.gpus_per_node or container is None or not container.sm:
        return
    told = {line.strip() for line in _nvidia_smi("--query-gpu=compute_cap") or ()}
    for sm in sorted(int(text.replace(".", "")) for text in told if text.replace(".", "").isdigit()):
        binary = any(code // 10 == sm // 10 and code <= sm for code in container.sm)
        if not binary and (container.ptx is None or container.ptx > sm):
            codes = ", ".join(f"sm_{code}" for code in container.sm)
            yield Finding("gpus", True, f"its GPUs are sm_{sm}, and {container.image} has code for {codes} only")


def _memlock(plan: LaunchPlan) -> Iterator[Finding]:
    """A real mlock(2): the limit that ulimit prints is not always the one that holds (usernetes#373)."""
    if not plan.gpus_per_node:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(LOCKED_BYTES)
    if libc.mlock(buffer, ctypes.c_size_t(LOCKED_BYTES)) != 0:
        reason = os.strerror(ctypes.get_errno())
        with_fabric = bool(plan.container and plan.container.infiniband)
        yield Finding("memlock", with_fabric, f"64 MiB cannot be locked ({reason}): InfiniBand needs memlock unlimited")
        return
    libc.munlock(buffer, ctypes.c_size_t(LOCKED_BYTES))


def _shared_memory(plan: LaunchPlan) -> Iterator[Finding]:
    """Room in /dev/shm, where no container brings its own."""
    if not plan.gpus_per_node or (plan.container is not None and plan.container.shm_bytes is not None):
        return
    free = shutil.disk_usage("/dev/shm").free
    if free < LEAST_FREE_BYTES:
        yield Finding("shm", True, f"/dev/shm has {free >> 20} MiB free; NCCL needs about a GiB")


def _disk(plan: LaunchPlan) -> Iterator[Finding]:
    """Room for checkpoints where they are written, and for the image where a daemon of the job's own keeps it."""
    free = shutil.disk_usage(plan.run_dir).free
    if free < LEAST_FREE_BYTES:
        yield Finding("disk", True, f"{plan.run_dir} has {free >> 20} MiB free; there is no room for a checkpoint")
    archive = plan.container.archive if plan.container else None
    if archive is None or archive.bytes is None or plan.runtime != "docker-rootless":
        return
    data_root = _existing(data_root_base(plan))
    room = shutil.disk_usage(str(data_root)).free
    if room < UNPACKED_PER_ARCHIVE * archive.bytes:
        yield Finding("disk", False, f"{data_root} has {room >> 20} MiB free, little for an image of this size")


def _existing(path: Path) -> Path:
    """A folder, or the nearest above it that is there already."""
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def _time_left(plan: LaunchPlan, environment: Mapping[str, str]) -> Iterator[Finding]:
    """Time until Slurm ends the job (SLURM_JOB_END_TIME, since 22.05)."""
    end = environment.get("SLURM_JOB_END_TIME", "")
    if end.isdigit() and int(end) - time.time() < plan.signal_lead_s:
        yield Finding("time", False, f"{int(end) - time.time():.0f} s are left of the time limit: too few to save in")


def clock(skew_s: float) -> list[Finding]:
    """The clock of this node against node 0's."""
    if abs(skew_s) <= MOST_CLOCK_SKEW_S:
        return []
    return [Finding("clock", False, f"its clock is {skew_s:+.0f} s off node 0's; logs will not merge by time")]


def _nvidia_smi(query: str) -> list[str] | None:
    """The lines that it prints; None where it fails.

    A driver that has lost a GPU may keep it in the kernel, where no signal ends it: it is not waited for then.
    """
    argv = ["nvidia-smi", query, "--format=csv,noheader"]
    try:
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        output, _ = process.communicate(timeout=NVIDIA_SMI_PATIENCE_S)
    except OSError:
        return None
    except subprocess.TimeoutExpired:
        process.kill()
        return None
    return output.decode("utf-8", "replace").splitlines() if process.returncode == 0 else None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())
