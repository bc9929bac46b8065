"""The container side of a node: the image is there before the run, the container is gone after it."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator

from cpm_cluster.agent.surroundings import NodeError
from cpm_cluster.launch.plan import Archive, LaunchPlan, NodeFacts
from cpm_cluster.runs.records import append_event

CLIENTS = {"docker": "docker", "docker-rootless": "docker", "podman": "podman"}
LOCK = "/var/tmp/cpm-image-{uid}.lock"
PATIENCE_WITH_SLURM_S = 30


def is_used(plan: LaunchPlan) -> bool:
    """Whether the agent itself starts a container; with pyxis, srun has done that already."""
    return plan.container is not None and plan.runtime in CLIENTS


def ensure_image(plan: LaunchPlan) -> str:
    """Load the image from its archive where it is missing; its id.

    Raises:
        NodeError: there is neither image nor archive, or the archive is not what was published.
    """
    client, container = CLIENTS[plan.runtime], plan.container
    assert container is not None
    with _alone():
        found = _image_id(client, container.image)
        if found is not None:
            return found
        if container.archive is None:
            raise NodeError(
                f"{container.image} is not on this node, and there is no archive to load it from;"
                " name image_folder in the cluster file, and archive in the image file"
            )
        check_archive(container.archive)
        _load(client, container.archive)
        found = _image_id(client, container.image)
    if found is None:
        raise NodeError(f"{container.archive.path} holds another image than {container.image}")
    return found


def check_archive(archive: Archive) -> None:
    """Name a broken download before docker speaks of an invalid tar header."""
    path = Path(archive.path)
    if not path.is_file():
        raise NodeError(f"image archive {path} is not there; download it, or mend image_folder in the cluster file")
    size = path.stat().st_size
    if archive.bytes is not None and size != archive.bytes:
        raise NodeError(f"image archive {path} has {size:,} bytes instead of {archive.bytes:,}: download it again")
    if archive.sha256 is not None and _sha256(path) != archive.sha256:
        raise NodeError(f"image archive {path} has another SHA-256 than published: download it again")


def remove(plan: LaunchPlan, node: NodeFacts, events: Path) -> None:
    """Record how the container ended, then remove it, running or not."""
    client, id_file = CLIENTS[plan.runtime], Path(node.container_id_file)
    container_id = id_file.read_text().strip() if id_file.exists() else ""
    if container_id:
        state = _inspected(client, container_id).get("State", {})
        append_event(events, "container", attempt=node.attempt, id=container_id, state=state)
        _remove(client, container_id)
    id_file.unlink(missing_ok=True)


def sweep_orphans(plan: LaunchPlan, node: NodeFacts, events: Path) -> None:
    """Remove what dead jobs, and earlier attempts of this one, left on this node.

    A job that Slurm still knows, or cannot be asked about, is alive. A rootless daemon has its data root for itself:
    what another left there is dead.
    """
    client = CLIENTS[plan.runtime]
    listed = _run([client, "ps", "--all", "--quiet", "--filter", "label=cpm.job"])
    for container_id in listed.stdout.decode("utf-8", "replace").split():
        labels = (_inspected(client, container_id).get("Config") or {}).get("Labels") or {}
        job, attempt = labels.get("cpm.job", ""), labels.get("cpm.attempt", "")
        is_here = labels.get("cpm.node") == node.name and is_dead(job, attempt, node)
        if plan.runtime == "docker-rootless" or is_here:
            _remove(client, container_id)
            append_event(events, "orphan", attempt=node.attempt, id=container_id, job=job)


def is_dead(job: str, attempt: str, node: NodeFacts) -> bool:
    """Whether an attempt of a job has ended, as this node's job sees it; what is no number is nobody's."""
    if job == node.job_id:
        return attempt.isdigit() and int(attempt) < node.attempt
    return job.isdigit() and not _job_is_alive(job)


def _remove(client: str, container_id: str) -> None:
    """Killed first: podman would wait for as long as --stop-timeout says."""
    _run([client, "kill", container_id])
    _run([client, "rm", "--force", "--volumes", container_id])


def _job_is_alive(job: str) -> bool:
    argv = ["squeue", "--noheader", f"--jobs={job}", "--states=all", "--format=%T"]
    try:
        done = subprocess.run(argv, capture_output=True, timeout=PATIENCE_WITH_SLURM_S)
    except (OSError, subprocess.TimeoutExpired):
        return True
    if done.returncode != 0:
        return b"Invalid job id" not in done.stderr
    states = done.stdout.decode("utf-8", "replace").split()
    return any(state in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED") for state in states)


def _load(client: str, archive: Archive) -> None:
    done = _run([client, "load", "--input", archive.path])
    if done.returncode != 0:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise NodeError(f"{client} load --input {archive.path} failed: {said[-1] if said else 'it said nothing'}")


def _image_id(client: str, image: str) -> str | None:
    found = _run([client, "image", "inspect", "--format", "{{.Id}}", image])
    return found.stdout.decode("utf-8", "replace").strip() if found.returncode == 0 else None


def _inspected(client: str, container_id: str) -> dict[str, Any]:
    found = _run([client, "inspect", container_id])
    try:
        first = json.loads(found.stdout)[0]
    except (ValueError, IndexError, KeyError):
        return {}
    return first if isinstance(first, dict) else {}


def _run(argv: list[str]) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True)
    except OSError as error:
        raise NodeError(f"{argv[0]} cannot be run on this node: {error.strerror}") from error


@contextmanager
def _alone() -> Iterator[None]:
    """One load of this user's at a time on this machine: two would unpack the same layers twice."""
    with open(LOCK.format(uid=os.getuid()), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _sha256(path: Path) -> str:
    import hashlib  # OpenSSL takes 10 ms to load, and most launches find their image there

    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()
