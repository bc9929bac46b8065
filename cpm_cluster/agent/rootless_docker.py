"""A rootless dockerd of this job's own, on this node, for this attempt; child of the agent, gone with it.

Daemon and containers have a process namespace of their own, so that they cannot outlive the Slurm step, not even by
SIGKILL: in control groups of version 1 runc gives a container a group below the step's, of which Slurm knows nothing.

Two jobs of one user on a node cannot break each other: each has its runtime folder, and takes a data root that no other
daemon holds. Data roots stay for the next job, so that an image is loaded once. A runtime folder that an agent left,
killed together with its guard, is removed by the next.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import IO

from cpm_cluster.agent import process_tree
from cpm_cluster.agent.containers import is_dead
from cpm_cluster.agent.surroundings import NodeError
from cpm_cluster.launch.plan import LaunchPlan, NodeFacts

# Sockets may be 108 bytes long (unix(7)); tmpfs, since a network file system has no sockets.
RUNTIME_FOLDERS = (Path("/dev/shm"), Path("/tmp"))
RUNTIME_FOLDER = "cpm-{uid}-{job}.{attempt}-{index}"
# In the runtime folder, a link to the data root.
DATA_ROOT = "data-root"
DEFAULT_DATA_ROOT = "/var/tmp/cpm-docker-{uid}"
MOST_DATA_ROOTS = 16
START_PATIENCE_S = 60.0
ANSWER_PATIENCE_S = 10.0
ENDING_PATIENCE_S = 5.0
STOP_PATIENCE_S = 15.0
# In the daemon's log: its news, the trace of dockerd-rootless.sh, and rootlesskit's word that its child has ended.
UNTELLING = re.compile(r"\+ |.*level=(?:debug|info|warning)|\[rootlesskit:\w+\s*\] error: .*exited: ")
TELLING = re.compile(r"level=(?:error|fatal)|[Ee]rror|[Ff]ailed|[Uu]nknown|[Dd]enied|[Cc]annot|not found")
OPTIONS = ("--exec-opt", "native.cgroupdriver=cgroupfs", "--iptables=false", "--bridge=none")


class RootlessDocker:
    """Its `environment` leads docker's client to it. `stop` belongs to every `start`, however that ended."""

    def __init__(self, node: NodeFacts, log: Path) -> None:
        self._node, self._log = node, log
        self.folder = _runtime_folder(node)
        self.environment = {
            "XDG_RUNTIME_DIR": str(self.folder),
            "DOCKER_HOST": f"unix://{self.folder}/docker.sock",
        }
        self._lock: IO[str] | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, plan: LaunchPlan) -> None:
        """Start the daemon and wait until it answers.

        Raises:
            NodeError: it does not come up in a minute, is not rootless, or there is no docker to ask it with.
        """
        _sweep(self._node)
        self._lock, data_root = _take_data_root(plan, self._node)
        self._start(data_root)

    def revive(self) -> None:
        """Start it again where it was killed: only a daemon removes a container from its data root.

        Nothing happens where it lives, never started, or cannot be started: the next one there finds the container.
        """
        if self._process is not None and self._process.poll() is None:
            return
        try:
            data_root = Path(os.readlink(str(self.folder / DATA_ROOT)))
            self._lock = self._lock or _locked_once_free(data_root)
            if self._lock is not None:
                self._start(data_root)
        except (OSError, NodeError):
            return

    def require_running(self) -> None:
        """Raise NodeError where it has ended, or does so now: docker notices before rootlesskit does."""
        try:
            if self._process is not None:
                self._process.wait(ENDING_PATIENCE_S)
        except subprocess.TimeoutExpired:
            return
        raise NodeError(f"its Docker daemon ended while the container ran ({self._log})", [self._node.name])

    def _start(self, data_root: Path) -> None:
        _remove(self.folder)
        self.folder.mkdir(mode=0o700)
        (self.folder / DATA_ROOT).symlink_to(str(data_root))
        folders = ["--data-root", str(data_root), "--exec-root", f"{self.folder}/x"]
        folders += ["--pidfile", f"{self.folder}/docker.pid"]
        flags = {"DOCKERD_ROOTLESS_ROOTLESSKIT_FLAGS": f"--pidns --state-dir={self.folder}/rootlesskit"}
        environment = {**os.environ, **self.environment, **flags}
        try:
            with open(self._log, "ab") as log:
                argv = ["dockerd-rootless.sh", *OPTIONS, *folders]
                self._process = process_tree.start_child(argv, environment, log, self.folder, self._lock)
        except OSError as error:
            raise NodeError(
                f"dockerd-rootless.sh cannot be run on this node ({error.strerror}): load the site's module for"
                " rootless Docker (runtimes: modules in the cluster file), or use another runtime"
            ) from error
        self._wait_until_it_answers(self._process)

    def stop(self) -> bool:
        """End the daemon and remove its runtime folder; whether nothing is left of it."""
        ended = self._process is None or _end(self._process)
        _remove(self.folder)
        if self._lock is not None:
            self._lock.close()
        return ended and not self.folder.exists()

    def _wait_until_it_answers(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + START_PATIENCE_S
        while time.monotonic() < deadline and process.poll() is None:
            security = self._ask()
            if security is not None:
                if "rootless" not in security:
                    raise NodeError(f"{self.environment['DOCKER_HOST']} is not rootless ({security})")
                return
            time.sleep(0.1)
        state = "ended" if process.poll() is not None else f"does not answer after {START_PATIENCE_S:.0f} s"
        raise NodeError(f"rootless dockerd {state}: {_last_error(self._log)}\n  all of it: {self._log}")

    def _ask(self) -> str | None:
        # without a server docker may say [] and exit 0
        argv = ["docker", "info", "--format", "{{if .ID}}{{.SecurityOptions}}{{end}}"]
        environment = {**os.environ, **self.environment}
        try:
            done = subprocess.run(
                argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=ANSWER_PATIENCE_S
            )
        except subprocess.TimeoutExpired:
            return None
        except OSError as error:
            raise NodeError(
                f"docker cannot be run on this node ({error.strerror}): load the site's module for it (runtimes:"
                " modules in the cluster file), or use another runtime"
            ) from error
        return done.stdout.decode("utf-8", "replace").strip() or None if done.returncode == 0 else None


def _end(process: subprocess.Popen[bytes]) -> bool:
    """TERM, patience, KILL for the daemon and all below it; whether none is left."""
    family = [process.pid, *process_tree.descendants(process.pid)]
    process_tree.send([process.pid], signal.SIGTERM)
    deadline = time.monotonic() + STOP_PATIENCE_S
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    return process_tree.end_all(lambda: [pid for pid in family if process_tree.is_alive(pid)], 1.0)


def _runtime_folder(node: NodeFacts) -> Path:
    """A private folder with a short path, named after job, attempt and node: all nodes may share one machine.

    The node's number, not its name, which may be as long as a path to a socket.
    """
    base = next((folder for folder in RUNTIME_FOLDERS if os.access(str(folder), os.W_OK | os.X_OK)), Path("/tmp"))
    return base / RUNTIME_FOLDER.format(uid=os.getuid(), job=node.job_id, attempt=node.attempt, index=node.index)


def _sweep(node: NodeFacts) -> None:
    """Remove the runtime folders of this user's attempts that are dead and hold no data root.

    Anybody can make a folder of such a name there: what is not the user's own is not looked into.
    """
    name = re.compile(RUNTIME_FOLDER.format(uid=os.getuid(), job=r"(\d+)", attempt=r"(\d+)", index=r"\d+"))
    for base in RUNTIME_FOLDERS:
        for folder in base.glob("cpm-*"):
            found = name.fullmatch(folder.name)
            if found and _is_own(folder) and not _is_held(folder) and is_dead(found[1], found[2], node):
                _remove(folder)


def _is_own(folder: Path) -> bool:
    try:
        return folder.lstat().st_uid == os.getuid()
    except OSError:  # its own agent was quicker
        return False


def _is_held(folder: Path) -> bool:
    """Whether an agent holds the data root of a runtime folder."""
    try:
        lock = _locked(Path(os.readlink(str(folder / DATA_ROOT))))
    except OSError:
        return False
    if lock is not None:
        lock.close()
    return lock is None


def _remove(folder: Path) -> None:
    """Some of it belongs to the user's subordinate ids: only a user namespace can remove that."""
    if folder.exists() and shutil.which("rootlesskit"):
        argv = ["rootlesskit", "rm", "-rf", str(folder)]
        subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    shutil.rmtree(str(folder), ignore_errors=True)


def data_root_base(plan: LaunchPlan) -> Path:
    """Where the data roots of this user lie on a node."""
    return Path((plan.data_root or DEFAULT_DATA_ROOT).replace("{uid}", str(os.getuid())))


def _take_data_root(plan: LaunchPlan, node: NodeFacts) -> tuple[IO[str], Path]:
    """A data root that no other daemon uses, with the lock that says so."""
    base = data_root_base(plan) / node.name
    base.mkdir(mode=0o700, parents=True, exist_ok=True)
    for number in range(MOST_DATA_ROOTS):
        folder = base / str(number)
        lock = _locked(folder)
        if lock is not None:
            folder.mkdir(exist_ok=True)
            return lock, folder
    raise NodeError(f"{MOST_DATA_ROOTS} daemons of yours run on this node already ({base}); end some of them")


def _locked(data_root: Path) -> IO[str] | None:
    """The lock of a data root; None where another daemon holds it."""
    lock = open(f"{data_root}.lock", "w")  # noqa: SIM115 - held as long as the daemon lives, which inherits it
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        return None
    return lock


def _locked_once_free(data_root: Path) -> IO[str] | None:
    """The lock of a data root whose agent was killed: its daemon is about to end, too."""
    deadline = time.monotonic() + STOP_PATIENCE_S
    lock = _locked(data_root)
    while lock is None and time.monotonic() < deadline:
        time.sleep(0.1)
        lock = _locked(data_root)
    return lock


def _last_error(log: Path) -> str:
    """The daemon's reason, which rootlesskit's own messages follow."""
    lines = [line.strip() for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
    said = [line for line in lines if not UNTELLING.match(line)]
    told = [line for line in said if TELLING.search(line)]
    return (told or said or lines or ["it said nothing"])[-1]
