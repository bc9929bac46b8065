"""The container side of the sandbox: image, Docker of root, rootless Docker and podman, pretend GPUs in containers."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from string import Template

from cpm_cluster.sandbox import (
    accounts,
    container_leftovers,
    dockerd,
    host_settings,
    image,
    mounts,
    network,
    podman,
    processes,
    slurm_conf,
)
from cpm_cluster.sandbox.commands import SYSTEM_PATH, run
from cpm_cluster.sandbox.image import Manifest
from cpm_cluster.sandbox.progress import step
from cpm_cluster.sandbox.slurm_conf import Rendered
from cpm_cluster.sandbox.state import Part, Sandbox, SandboxError

PACKAGES = {
    **image.PACKAGES,
    "dockerd": "docker.io",
    "docker": "docker.io",
    "docker-init": "tini",
    "rootlesskit": "rootlesskit",
    "slirp4netns": "slirp4netns",
    "newuidmap": "uidmap",
    "fuse-overlayfs": "fuse-overlayfs",
    "podman": "podman",
    "runc": "runc",
    "catatonit": "catatonit",
}
ROOTLESS_SCRIPTS = ("/usr/bin/dockerd-rootless.sh", "/usr/share/docker.io/contrib/dockerd-rootless.sh")
PATIENCE_S = 30.0
PATIENCE_WITH_CONTAINERS_S = 5.0


def up(state: Sandbox) -> None:
    """Bring up what is missing of it.

    Raises:
        SandboxError: what is missing or in the way, in one sentence.
    """
    with step("image: CPU stand-in"):
        manifest = image.ensure(state)
    with step("settings for rootless containers"):
        host_settings.apply(state, (*dockerd.LEFTOVERS, *podman.leftovers(state)))
        _write_files(state, manifest)
        podman.prepare(state)
    with step("Docker daemons"):
        for engine in dockerd.engines(state):
            engine.start()
    with step("image loaded by Docker and podman"):
        loads: list[Callable[[Manifest], None]] = [engine.load for engine in dockerd.engines(state)]
        loads.append(lambda manifest: podman.load(state, manifest))
        with ThreadPoolExecutor(len(loads)) as pool:
            list(pool.map(lambda load: load(manifest), loads))


def down(state: Sandbox) -> None:
    """End and remove it; nothing to do where it is not up.

    Raises:
        SandboxError: what does not end.
    """
    # the account, and the names of control groups, are the same in every folder
    elsewhere = network.is_up_elsewhere(state)
    users = host_settings.ids_of(state) if accounts.exists(state) and not elsewhere else []
    # containers first: dockerd would wait for as long as a job asks with --stop-timeout
    _end(lambda: container_leftovers.container_processes(state.root) | container_leftovers.processes_of(users))
    for engine in dockerd.engines(state):
        engine.file.end(PATIENCE_S)
    _end(lambda: container_leftovers.daemon_processes(dockerd.run_folder(state)))
    container_leftovers.remove_files_of(users)
    for folder in (dockerd.run_folder(state), dockerd.store(state), podman.store(state), state.run / "user"):
        for mounted in mounts.below(folder):
            run(["umount", str(mounted)])
        shutil.rmtree(folder, ignore_errors=True)
    for engine in () if elsewhere else dockerd.engines(state):
        container_leftovers.remove_control_groups(f"{dockerd.CGROUP}/{engine.name}")
    host_settings.restore(state)


def status(state: Sandbox) -> list[Part]:
    """What there is of it, for any user."""
    manifest = image.read_manifest(state)
    made = f"{manifest.tag}, {manifest.bytes / 1e6:.0f} MB, {manifest.stand_in} stand-in" if manifest else ""
    parts = [Part(name="image", up=manifest is not None, detail=made)]
    for engine in dockerd.engines(state):
        pid = engine.file.pid
        parts.append(Part(name=f"dockerd-{engine.name}", up=pid is not None, detail=f"{engine.socket}" if pid else ""))
    pid = podman.pause_file(state).pid
    parts.append(Part(name="podman", up=pid is not None, detail=f"{podman.store(state)}" if pid else ""))
    return parts


def _end(find: Callable[[], set[int]]) -> None:
    left = processes.end_all(find, PATIENCE_WITH_CONTAINERS_S)
    if left:
        raise SandboxError(f"processes {', '.join(map(str, sorted(left)))} do not end, not even by SIGKILL")


def _write_files(state: Sandbox, manifest: Manifest) -> None:
    """Programs for the nodes' PATH, and the user's configuration."""
    values = {
        "bin": str(state.bin),
        "gpu_table": str(state.gpu_table),
        "docker_run": str(dockerd.run_folder(state)),
        "user_run": str(podman.run_folder(state).parent),
        "podman_store": str(podman.store(state)),
        "uid": str(state.uid),
        "rootless_script": _rootless_script(),
        "docker": _program("docker"),
        "podman": _program("podman"),
    }

    def text(name: str) -> str:
        template = slurm_conf.templates() / "containers" / name
        return Template(template.read_text(encoding="utf-8")).substitute(values)

    config = state.home / ".config"
    _make_user_folders(state, config / "containers", config / "cpm-cluster" / "images")
    entry = config / "cpm-cluster" / "images" / f"{image.stem(manifest.tag)}.yaml"
    programs = ("docker", "dockerd-rootless.sh", "podman", "nvidia-container-runtime-hook")
    slurm_conf.write(
        [
            *(Rendered(state.bin / name, text(name), 0o755) for name in programs),
            *(Rendered(config / "containers" / name, text(name)) for name in ("storage.conf", "containers.conf")),
            Rendered(entry, image.catalogue_entry(manifest)),
        ]
    )


def _make_user_folders(state: Sandbox, *paths: Path) -> None:
    """Folders below the user's home, all of them the user's own."""
    for path in paths:
        path.mkdir(parents=True, exist_ok=True)
        for made in (path, *path.parents):
            if made.is_relative_to(state.home):
                os.chown(made, state.uid, state.gid)


def _rootless_script() -> str:
    found = next((path for path in ROOTLESS_SCRIPTS if Path(path).exists()), None)
    if found is None:
        raise SandboxError("there is no dockerd-rootless.sh: install docker.io, or docker-ce-rootless-extras of Docker")
    return found


def _program(name: str) -> str:
    return shutil.which(name, path=SYSTEM_PATH) or name
