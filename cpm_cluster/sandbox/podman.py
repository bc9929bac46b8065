"""Rootless podman for the ordinary user: one store of images for all nodes, and the pretend GPUs as CDI devices.

Podman has no daemon, so that its containers are on the node where the command runs, in the control group of the Slurm
step. Its containers live in a user and mount namespace that a first command leaves a process to hold; that process is
started here, since one started by a job would end with it, and with it the other jobs' view of their mounts.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from cpm_cluster.runs.records import write_text
from cpm_cluster.sandbox import gpus
from cpm_cluster.sandbox.commands import SYSTEM_PATH, run
from cpm_cluster.sandbox.container_leftovers import container_processes
from cpm_cluster.sandbox.image import Manifest, archive
from cpm_cluster.sandbox.processes import ProcessFile
from cpm_cluster.sandbox.state import Sandbox, SandboxError

LOAD_PATIENCE_S = 600.0
CDI = Path("/run/cdi/cpm-sandbox.json")


def prepare(state: Sandbox) -> None:
    """The user's folders, and the list of devices that `podman run --device nvidia.com/gpu=UUID` takes."""
    if pause_file(state).pid is None and not container_processes(state.root):
        # after a reboot podman would take the containers listed here for running: it looks for a tmpfs to be empty
        for name in ("libpod", "containers"):
            shutil.rmtree(run_folder(state) / name, ignore_errors=True)
    for folder in (run_folder(state), store(state)):
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        os.chown(folder, state.uid, state.gid)
    text = json.dumps(devices(state), indent=1) + "\n"
    if not CDI.exists() or CDI.read_text() != text:
        write_text(CDI, text)


def load(state: Sandbox, manifest: Manifest) -> None:
    """Load the image, unless that very image is there, and keep the user's namespaces.

    Raises:
        SandboxError: podman refuses the archive, or takes it for another image.
    """
    if _image_id(state, manifest.tag) != manifest.image_id:
        _podman(state, "load", "--quiet", f"--input={archive(state, manifest)}")
        found = _image_id(state, manifest.tag)
        if found != manifest.image_id:
            raise SandboxError(f"{manifest.file} was loaded, and {manifest.tag} is {found}, not {manifest.image_id}")
    pause_file(state).write(int((run_folder(state) / "libpod" / "tmp" / "pause.pid").read_text()))


def devices(state: Sandbox) -> dict[str, Any]:
    """The pretend GPUs in the Container Device Interface, each by its UUID, as nvidia-ctk lists real ones.

    Mounts stand for device nodes, since those are created anew, which an ordinary user cannot.
    """
    nvidia_smi = [_mount(state.bin / "nvidia-smi", "/usr/bin/nvidia-smi"), _mount(state.gpu_table, state.gpu_table)]
    listed = [
        {
            "name": gpus.gpu_uuid(node, index),
            "containerEdits": {"mounts": [_mount(path, path), _mount(path, f"/dev/nvidia{index}")]},
        }
        for node in state.nodes
        for index, path in enumerate(node.devices)
    ]
    return {
        "cdiVersion": "0.3.0",
        "kind": "nvidia.com/gpu",
        "containerEdits": {"mounts": nvidia_smi},
        "devices": listed,
    }


def leftovers(state: Sandbox) -> tuple[Path, ...]:
    """Files outside the sandbox's folder, inner ones first: the devices, and the shared memory of podman's locks."""
    return CDI, CDI.parent, Path(f"/dev/shm/libpod_rootless_lock_{state.uid}")


def run_folder(state: Sandbox) -> Path:
    """The ordinary user's XDG_RUNTIME_DIR, the same on all nodes, since the store is."""
    return state.run / "user" / str(state.uid)


def store(state: Sandbox) -> Path:
    """Images and containers."""
    return state.root / "podman"


def pause_file(state: Sandbox) -> ProcessFile:
    """The process that holds the user's namespaces."""
    return ProcessFile(state.run / "podman-pause.pid")


def _mount(source: Path, target: Path | str) -> dict[str, Any]:
    return {"hostPath": str(source), "containerPath": str(target), "options": ["bind"]}


def _image_id(state: Sandbox, tag: str) -> str:
    return _podman(state, "image", "ls", "--no-trunc", "--format={{.ID}}", tag).strip()


def _podman(state: Sandbox, *words: str) -> str:
    as_user = ["setpriv", f"--reuid={state.uid}", f"--regid={state.gid}", "--clear-groups", "--", "env", "--chdir=/"]
    environment = {"HOME": str(state.home), "XDG_RUNTIME_DIR": str(run_folder(state)), "PATH": SYSTEM_PATH}
    return run([*as_user, "podman", *words], environment=environment, patience_s=LOAD_PATIENCE_S)
