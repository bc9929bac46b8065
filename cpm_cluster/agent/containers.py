"""The container side of a node: the image is there before the run, the container is gone after it."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path

from cpm_cluster.agent.surroundings import NodeError
from cpm_cluster.launch.plan import Archive, LaunchPlan, NodeFacts
from cpm_cluster.runs.records import append_event

CLIENTS = {"docker": "docker", "docker-rootless": "docker", "podman": "podman"}


def ensure_image(plan: LaunchPlan) -> None:
    """Load the image from its archive where it is missing.

    Raises:
        NodeError: there is neither image nor archive, or the archive is not what was published.
    """
    client, container = CLIENTS.get(plan.runtime), plan.container
    if client is None or container is None or _succeeds([client, "image", "inspect", container.image]):
        return
    if container.archive is None:
        raise NodeError(
            f"{container.image} is not on this node, and there is no archive to load it from;"
            " name image_folder in the cluster file, and archive in the image file"
        )
    check_archive(container.archive)
    if not _succeeds([client, "load", "--input", container.archive.path]):
        raise NodeError(f"{client} load --input {container.archive.path} failed; its message is in the log above")
    if not _succeeds([client, "image", "inspect", container.image]):
        raise NodeError(f"{container.archive.path} holds another image than {container.image}")


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
    client, id_file = CLIENTS.get(plan.runtime), Path(node.container_id_file)
    if client is None or not id_file.exists():
        return
    container_id = id_file.read_text().strip()
    found = subprocess.run([client, "inspect", container_id], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    if found.returncode == 0:
        state = json.loads(found.stdout)[0].get("State", {})
        append_event(events, "container", attempt=node.attempt, id=container_id, state=state)
        _succeeds([client, "rm", "--force", container_id])
    id_file.unlink()


def _succeeds(argv: list[str]) -> bool:
    try:
        return subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL).returncode == 0
    except OSError as error:
        raise NodeError(f"{argv[0]} cannot be run on this node: {error.strerror}") from error


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()
