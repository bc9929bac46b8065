"""Docker daemons of root: one of the login node, which is this machine itself, and one on each of two nodes.

A daemon belongs to the network namespace that it was started in, and a container with `--network host` has the
address of its daemon: a node needs a daemon of its own. Each has its own socket, folders and control group, and none
touches the machine's network: no bridge, no firewall rules, no forwarding. Containers have the host's network.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from cpm_cluster.runs.records import write_text
from cpm_cluster.sandbox.commands import SYSTEM_PATH, run, succeeds
from cpm_cluster.sandbox.daemons import Daemon
from cpm_cluster.sandbox.image import Manifest, archive
from cpm_cluster.sandbox.processes import ProcessFile
from cpm_cluster.sandbox.state import Sandbox, SandboxError

NODES_WITH_DOCKER = 2
CGROUP = "cpm-sandbox"
LOAD_PATIENCE_S = 600.0
# paths that dockerd and containerd make whatever folders they are given, inner ones first
LEFTOVERS = tuple(
    map(Path, ("/etc/docker/key.json", "/etc/docker", "/run/docker/plugins", "/run/docker", "/run/containerd/s"))
) + (Path("/run/containerd"),)


@dataclass(frozen=True)
class Engine:
    """A Docker daemon and where it lives; `enter` is the argv prefix of its machine."""

    state: Sandbox
    name: str
    enter: tuple[str, ...] = ()

    @property
    def socket(self) -> Path:
        """Where it listens, for root and for the ordinary user."""
        return run_folder(self.state) / f"{self.name}.sock"

    @property
    def data(self) -> Path:
        """Images and containers."""
        return store(self.state) / self.name

    @property
    def file(self) -> ProcessFile:
        """By which its process is found again."""
        return ProcessFile(self.state.run / f"dockerd-{self.name}.pid")

    @property
    def daemon(self) -> Daemon:
        """The process."""
        config = self.state.etc / "dockerd.json"
        argv = [
            *self.enter,
            shutil.which("dockerd", path=SYSTEM_PATH) or "dockerd",
            f"--config-file={config}",
            f"--host=unix://{self.socket}",
            f"--group={self.state.gid}",
            f"--data-root={self.data}",
            f"--exec-root={self._exec_root}",
            f"--pidfile={self._own_pid_file}",
            f"--cgroup-parent=/{CGROUP}/{self.name}",
            "--exec-opt=native.cgroupdriver=cgroupfs",
            *("--bridge=none", "--iptables=false", "--ip6tables=false", "--ip-forward=false", "--ip-masq=false"),
        ]
        return Daemon(
            name=f"dockerd-{self.name}",
            argv=tuple(argv),
            log=self.state.log / f"dockerd-{self.name}.log",
            file=self.file,
            ready=lambda: succeeds([*self._client, "version"], patience_s=5),
            # docker offers --gpus if it finds NVIDIA's hook on PATH when it starts
            environment={"PATH": f"{self.state.bin}:{SYSTEM_PATH}"},
        )

    @property
    def _own_pid_file(self) -> Path:
        return run_folder(self.state) / f"{self.name}.pid"

    @property
    def _exec_root(self) -> Path:
        """State of running containers; its containerd listens there."""
        return run_folder(self.state) / self.name

    @property
    def _client(self) -> list[str]:
        return ["docker", f"--host=unix://{self.socket}"]

    def start(self) -> None:
        """Start it, unless it runs."""
        self.socket.parent.mkdir(parents=True, exist_ok=True)
        # an empty one of its own, so that this machine's /etc/docker/daemon.json does not apply
        write_text(self.state.etc / "dockerd.json", "{}\n")
        if self.file.pid is None:
            self._forget_processes()
        self.daemon.start()

    def _forget_processes(self) -> None:
        """Remove the process-id files of dockerd and of its containerd, which dies with it.

        dockerd believes in them: it does not start where the number is another process's by now, or it waits for a
        containerd of which nothing is left but a zombie.
        """
        for path in (self._own_pid_file, self._exec_root / "containerd" / "containerd.pid"):
            path.unlink(missing_ok=True)

    def load(self, manifest: Manifest) -> None:
        """Load the image, unless that very image is there.

        Raises:
            SandboxError: docker refuses the archive, or takes it for another image.
        """
        if self.image_id(manifest.tag) == manifest.image_id:
            return
        run([*self._client, "load", "--quiet", f"--input={archive(self.state, manifest)}"], patience_s=LOAD_PATIENCE_S)
        found = self.image_id(manifest.tag)
        if found != manifest.image_id:
            raise SandboxError(f"{manifest.file} was loaded, and {manifest.tag} is {found}, not {manifest.image_id}")

    def image_id(self, tag: str) -> str:
        """The id of an image; empty if there is none of that tag."""
        return run([*self._client, "image", "ls", "--no-trunc", "--format={{.ID}}", tag]).strip()


def engines(state: Sandbox) -> list[Engine]:
    """All daemons, the login node's first."""
    nodes = [Engine(state, node.name, tuple(node.enter)) for node in state.nodes[:NODES_WITH_DOCKER]]
    return [Engine(state, os.uname().nodename), *nodes]


def run_folder(state: Sandbox) -> Path:
    """Where the sockets are."""
    return state.run / "docker"


def store(state: Sandbox) -> Path:
    """Where all images and containers are."""
    return state.root / "docker"
