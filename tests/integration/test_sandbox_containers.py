"""The containers of the sandbox with their real daemons: one image for three runtimes, on nodes with their own address.

Needs root and Debian's packages. A sandbox that is up already is used, and stays; otherwise one is brought up.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from cpm_cluster.sandbox import (
    container_leftovers,
    containers,
    dockerd,
    gpus,
    host_settings,
    image,
    podman,
)
from cpm_cluster.sandbox.cgroups import MOUNT
from cpm_cluster.sandbox.image import Manifest
from cpm_cluster.sandbox.mounts import below
from cpm_cluster.sandbox.state import Host, Sandbox
from cpm_cluster.specs.catalogue import Catalogue, packaged_configs
from cpm_cluster.specs.image import Image
from cpm_cluster.specs.nodes import read_yaml

STATE = Sandbox()
TAG = "cpmlive-flash:0.0.4"
GIB = 1 << 30
# A daemon starts in a second or two on idle cores, the image is loaded in 15 s; these may have ten times as much to do.
PATIENCE_S = 300.0
STUBBORN = ["sh", "-c", "trap '' TERM; while :; do sleep 1; done"]


@pytest.fixture(scope="module")
def manifest(cluster: Sandbox) -> Manifest:
    found = image.read_manifest(cluster)
    assert found is not None
    return found


@dataclass(frozen=True)
class Runtime:
    """A runtime on a node, as the ordinary user has it there."""

    state: Sandbox
    host: Host
    program: str
    variables: tuple[str, ...] = ()

    def start(self, *words: str) -> subprocess.CompletedProcess[str]:
        argv = on_node(self.state, self.host, *self.variables, self.program, *words)
        return subprocess.run(argv, capture_output=True, text=True, timeout=PATIENCE_S)

    def out(self, *words: str) -> str:
        done = self.start(*words)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def in_container(self, script: str, *options: str) -> str:
        network_of_node = ("--network", "host", *(("--cgroups", "no-conmon") if self.program == "podman" else ()))
        return self.out("run", "--rm", "--init", *network_of_node, *options, TAG, "sh", "-c", script)

    def gpus(self, *uuids: str) -> list[str]:
        """As the launch plan asks for GPUs."""
        if self.program == "podman":
            return [word for uuid in uuids for word in ("--device", f"nvidia.com/gpu={uuid}")]
        return ["--gpus", '"device={}"'.format(",".join(uuids))]


def on_node(state: Sandbox, host: Host, *argv: str) -> list[str]:
    """Argv of a command of the ordinary user on a node; variables first, as for env(1)."""
    user = ["setpriv", f"--reuid={state.uid}", f"--regid={state.gid}", "--clear-groups", "--"]
    # as many logins have it: without the folders for system programs
    variables = [f"PATH={state.bin}:/usr/bin:/bin", f"HOME={state.home}"]
    return [*host.enter, *user, "env", "--ignore-environment", "--chdir=/", *variables, *argv]


class RootlessDocker:
    """A daemon of the ordinary user on a node, as the node agent starts one for a job."""

    def __init__(self, state: Sandbox, host: Host, name: str) -> None:
        self.folder = state.run / "user" / str(state.uid) / name
        self.data = state.home / f"docker-{name}"
        for folder in (self.folder, self.data):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(mode=0o700)
            os.chown(folder, state.uid, state.gid)
        self.socket = self.folder / "docker.sock"
        self.log = state.log / f"rootless-{name}.log"
        self.runtime = Runtime(state, host, "docker", (f"DOCKER_HOST=unix://{self.socket}",))
        variables = [
            f"XDG_RUNTIME_DIR={self.folder}",
            f"DOCKERD_ROOTLESS_ROOTLESSKIT_FLAGS=--state-dir={self.folder}/rootlesskit",
        ]
        options = ["--exec-opt", "native.cgroupdriver=cgroupfs", "--iptables=false", "--bridge=none"]
        options += ["--data-root", str(self.data), "--exec-root", str(self.folder / "x")]
        options += ["--pidfile", str(self.folder / "docker.pid")]
        argv = on_node(state, host, *variables, "dockerd-rootless.sh", *options)
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(argv, stdout=log, stderr=log, start_new_session=True)
        assert eventually(lambda: self.runtime.start("info").returncode == 0), self.log.read_text()

    def end(self) -> None:
        if self.process.poll() is not None:
            return
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout=PATIENCE_S)
        shutil.rmtree(self.folder)
        shutil.rmtree(self.data)


@pytest.fixture(scope="module")
def rootless(cluster: Sandbox) -> Iterator[RootlessDocker]:
    daemon = RootlessDocker(cluster, cluster.nodes[0], "a")
    daemon.runtime.out("load", "--quiet", "--input", str(image.folder(cluster) / "cpmlive-flash-0.0.4.tar"))
    yield daemon
    daemon.end()


@pytest.fixture(params=["docker on node 0", "docker on node 1", "podman on node 2", "docker-rootless on node 0"])
def runtime(request: pytest.FixtureRequest, cluster: Sandbox) -> Runtime:
    program, _, node = request.param.partition(" on node ")
    if program == "docker-rootless":
        daemon: RootlessDocker = request.getfixturevalue("rootless")
        return daemon.runtime
    return Runtime(cluster, cluster.nodes[int(node)], program)


def eventually(condition, patience_s: float = PATIENCE_S) -> bool:
    deadline = time.monotonic() + patience_s
    while not (true := condition()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return bool(true)


def test_the_manifest_is_true(cluster, manifest):
    file = image.folder(cluster) / manifest.file
    assert file.name == "cpmlive-flash-0.0.4.tar"
    assert file.stat().st_size == manifest.bytes
    with open(file, "rb") as content:
        digest = hashlib.sha256()
        for block in iter(lambda: content.read(1 << 20), b""):
            digest.update(block)
    assert digest.hexdigest() == manifest.sha256


def test_the_image_says_that_it_is_a_stand_in(cluster, manifest):
    docker = Runtime(cluster, cluster.nodes[0], "docker")
    labels = docker.out("image", "inspect", TAG, "--format", '{{index .Config.Labels "cpm.stand-in"}} {{.Id}}')
    assert labels.split() == ["cpu", manifest.image_id]


def test_a_job_file_of_the_ordinary_user_gets_the_stand_in_under_the_same_name(cluster, manifest):
    catalogue = Catalogue((cluster.home / ".config" / "cpm-cluster", packaged_configs()))
    path = catalogue.find("images", TAG)
    assert path is not None and path.is_relative_to(cluster.home)
    problems = []
    read_yaml(path, "image", problems)
    assert problems == []
    entry = Image(**{k: v for k, v in yaml.safe_load(path.read_text()).items() if k not in ("archive", "packages")})
    assert (entry.tag, entry.gpu, entry.torch) == (TAG, False, manifest.software["torch"])
    assert yaml.safe_load(path.read_text())["archive"]["sha256"] == manifest.sha256
    beside = image.folder(cluster) / "cpmlive-flash-0.0.4.yaml"
    assert beside.read_text() == path.read_text()


def test_what_the_manifest_says_is_inside_is_inside(runtime, manifest):
    names = ("torch", "numpy", "tensorboardX", "safetensors", "tokenizers")
    script = f"import {', '.join(names)}, pytrie, platform; print(platform.python_version(), "
    script += ", ".join(f"{name}.__version__" for name in names) + ")"
    words = runtime.in_container(f"python3 -c '{script}'").split()
    assert words == [manifest.software[name] for name in ("python", *names)]


def test_a_container_is_on_the_node_where_it_was_started(runtime, rootless):
    name, address = runtime.in_container("uname -n; ip -4 -o addr show scope global | cut -d/ -f1").split("\n")[:2]
    assert name == runtime.host.name
    if runtime is rootless.runtime:
        # "host" is rootlesskit's own network: the reason why jobs on several nodes need another runtime
        assert address.split()[-1] == "10.0.2.100"
    else:
        assert address.split()[-1] == str(runtime.host.address)


def test_shared_memory_is_as_large_as_asked_for(runtime):
    size = runtime.in_container("df -B1 --output=size /dev/shm | tail -1", "--shm-size", str(3 * GIB))
    assert int(size) == 3 * GIB


def test_a_container_sees_the_gpus_that_it_was_given_and_no_others(runtime):
    node = next(node for node in STATE.nodes if node.name == runtime.host.name)
    given = [gpus.gpu_uuid(node, index) for index in (1, 2, 5, 6)]
    listed = runtime.in_container("nvidia-smi --query-gpu=uuid --format=csv,noheader; ls /dev", *runtime.gpus(*given))
    assert [line for line in listed.splitlines() if line.startswith("GPU-")] == given
    assert [line for line in listed.splitlines() if line.startswith("nvidia")] == [f"nvidia{i}" for i in (1, 2, 5, 6)]


def test_a_gpu_of_another_node_is_refused(runtime):
    elsewhere = gpus.gpu_uuid(STATE.nodes[6], 0)
    if runtime.program == "podman":
        pytest.skip("podman lists the devices of all nodes: they are one machine to it")
    done = runtime.start("run", "--rm", "--network", "host", *runtime.gpus(elsewhere), TAG, "true")
    assert done.returncode != 0
    assert f"{elsewhere}: unknown device" in done.stderr


def test_files_of_a_container_belong_to_the_user(runtime, cluster):
    folder = cluster.shared / f"owned-{os.getpid()}"
    folder.mkdir()
    os.chown(folder, cluster.uid, cluster.gid)
    try:
        rootful = runtime.program == "docker" and not runtime.variables
        user = ("--user", f"{cluster.uid}:{cluster.gid}") if rootful else ()
        runtime.in_container("echo kept > /run-dir/file", "--volume", f"{folder}:/run-dir", *user)
        assert (folder / "file").read_text() == "kept\n"
        assert (folder / "file").stat().st_uid == cluster.uid
    finally:
        shutil.rmtree(folder)


def test_podman_serves_all_nodes_from_one_store_at_once(cluster):
    script = "ip -4 -o addr show eth0 | cut -d/ -f1; sleep 2"
    argv = ["podman", "run", "--rm", "--network=host", "--cgroups=no-conmon", TAG, "sh", "-c", script]
    started = [
        subprocess.Popen(on_node(cluster, node, *argv), stdout=subprocess.PIPE, text=True) for node in cluster.nodes
    ]
    answers = [process.communicate(timeout=PATIENCE_S)[0].split()[-1] for process in started]
    assert answers == [str(node.address) for node in cluster.nodes]


def test_rootless_docker_says_that_it_is_rootless_and_leaves_cgroups_to_slurm(rootless):
    facts = rootless.runtime.out("info", "--format", "{{.SecurityOptions}} {{.CgroupDriver}} {{.Driver}}")
    assert "name=rootless" in facts
    assert facts.split()[-2:] == ["none", "overlay2"]


def test_two_rootless_daemons_of_one_user_do_not_touch_each_other(cluster, rootless):
    other = RootlessDocker(cluster, cluster.nodes[0], "b")
    try:
        assert other.runtime.out("image", "ls", "--quiet") == ""
        assert rootless.runtime.out("image", "ls", "--quiet") != ""
    finally:
        other.end()
    assert rootless.runtime.in_container("echo still here") == "still here\n"


def test_a_node_without_a_daemon_says_so(cluster):
    done = Runtime(cluster, cluster.nodes[2], "docker").start("ps")
    assert done.returncode != 0
    assert f"{cluster.nodes[2].name}.sock" in done.stderr


def test_daemons_leave_the_network_of_the_machine_alone(cluster):
    assert not Path("/sys/class/net/docker0").exists()
    rules = subprocess.run(["iptables", "-S"], capture_output=True, text=True).stdout
    assert "DOCKER" not in rules
    assert "-P FORWARD ACCEPT" in rules


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The commands that load the image."""
    found: list[str] = []

    def noted(run: Callable[..., str]) -> Callable[..., str]:
        def run_noted(argv: Sequence[str], **options: object) -> str:
            found.extend([" ".join(argv)] if "load" in argv else [])
            return run(argv, **options)

        return run_noted

    for client in (dockerd, podman):
        monkeypatch.setattr(client, "run", noted(client.run))
    return found


def test_up_again_changes_nothing(cluster, loads):
    containers.up(cluster)  # podman's process that holds the namespaces ends with the job that started it
    before = processes_of(cluster)
    loads.clear()
    containers.up(cluster)
    assert (processes_of(cluster), loads) == (before, [])


def processes_of(state: Sandbox) -> list[int | None]:
    """The daemons, and the process that holds podman's namespaces."""
    return [file.pid for file in (*(engine.file for engine in dockerd.engines(state)), podman.pause_file(state))]


def test_up_brings_back_a_killed_daemon_with_its_image(cluster, manifest, loads):
    engine = dockerd.engines(cluster)[1]
    os.kill(engine.file.pid, signal.SIGKILL)
    assert eventually(lambda: engine.file.pid is None)
    assert [part.up for part in containers.status(cluster) if part.name == f"dockerd-{engine.name}"] == [False]
    containers.up(cluster)
    assert loads == []
    assert engine.image_id(TAG) == manifest.image_id
    assert all(part.up for part in containers.status(cluster))


def test_down_leaves_nothing_even_of_daemons_that_were_killed(cluster, rootless):
    rootless.end()
    orphans = RootlessDocker(cluster, cluster.nodes[0], "orphans")
    archive = str(image.folder(cluster) / "cpmlive-flash-0.0.4.tar")
    orphans.runtime.out("load", "--quiet", "--input", archive)
    detached = ["run", "--detach", "--init", "--network", "host"]
    runtimes = [orphans.runtime, Runtime(cluster, cluster.nodes[1], "docker")]
    runtimes.append(Runtime(cluster, cluster.nodes[3], "podman"))
    for each in runtimes:
        patience = () if each.program == "podman" else ("--stop-timeout", "600")
        each.out(*detached, *patience, TAG, *STUBBORN)
    os.kill(dockerd.engines(cluster)[2].file.pid, signal.SIGKILL)
    os.kill(int((orphans.folder / "docker.pid").read_text()), signal.SIGKILL)
    stores = [dockerd.store(cluster), podman.store(cluster)]
    assert len(container_leftovers.container_processes(cluster.root)) >= 6

    containers.down(cluster)
    orphans.process.wait(timeout=PATIENCE_S)

    assert container_leftovers.container_processes(cluster.root) == set()
    assert container_leftovers.daemon_processes(dockerd.run_folder(cluster)) == set()
    assert container_leftovers.processes_of(host_settings.ids_of(cluster)) == set()
    namespaces = {path for host in cluster.hosts for path in (host.netns, host.uts)}
    assert set(below(cluster.root)) - namespaces == set()
    assert [store for store in stores if store.exists()] == []
    assert list(MOUNT.glob(f"*/{dockerd.CGROUP}")) == []
    assert [path for path in (*dockerd.LEFTOVERS, *podman.leftovers(cluster)) if path.exists()] == []
    shutil.rmtree(orphans.data)
    containers.up(cluster)
    assert all(part.up for part in containers.status(cluster))
    assert stat.S_IMODE(Path("/dev/net/tun").stat().st_mode) == 0o666
