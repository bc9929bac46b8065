"""The daemons, in the order in which they need each other: munged, mariadbd, slurmdbd, slurmctld, a slurmd per node."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from cpm_cluster.sandbox import processes
from cpm_cluster.sandbox.commands import SYSTEM_PATH, wait_for
from cpm_cluster.sandbox.processes import ProcessFile
from cpm_cluster.sandbox.state import Node, Sandbox, SandboxError

CONTROLLER_PORT, NODE_PORT, DATABASE_PORT = 16817, 16818, 16819
PATIENCE_S = 120.0


@dataclass(frozen=True, kw_only=True)
class Daemon:
    """One daemon, in the foreground of a session of its own."""

    name: str
    argv: tuple[str, ...]
    log: Path
    file: ProcessFile
    ready: Callable[[], bool]
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def is_alive(self) -> bool:
        """Whether the process that we started lives."""
        return self.file.pid is not None

    def start(self) -> bool:
        """Start it unless it lives, and wait until it answers; whether it had to be started.

        Raises:
            SandboxError: it ends, or does not answer in time; with the last line of its log.
        """
        if self.is_alive:
            return False
        environment = {"PATH": SYSTEM_PATH, "LC_ALL": "C.UTF-8", **self.environment}
        process = processes.start(self.argv, environment, self.log, self.file)
        wait_for(lambda: process.poll() is not None or self.ready(), PATIENCE_S)
        if process.poll() is not None:
            raise SandboxError(f"{self.name} ended with code {process.returncode}: {self._last_words()}")
        if not self.ready():
            raise SandboxError(f"{self.name} does not answer within {PATIENCE_S:.0f} s: {self._last_words()}")
        return True

    def stop(self) -> None:
        """End it."""
        self.file.end(PATIENCE_S / 2)
        if self.is_alive:
            raise SandboxError(f"{self.name} (process {self.file.pid}) does not end, not even by SIGKILL")

    def _last_words(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return f"{lines[-1].strip() if lines else 'no message'} ({self.log})"


def munged(state: Sandbox) -> Daemon:
    """Vouches for users; a key and a socket of its own."""
    folder = state.munge_socket.parent
    argv = (
        *_on_head(state, "munge"),
        "munged",
        "--foreground",
        f"--socket={state.munge_socket}",
        f"--key-file={state.munge_key}",
        f"--pid-file={folder / 'munged.pid'}",
        f"--seed-file={folder / 'seed'}",
    )
    return _daemon(state, "munged", argv, lambda: _listens(state.munge_socket))


def mariadbd(state: Sandbox) -> Daemon:
    """The database behind slurmdbd."""
    argv = (*_on_head(state, "mysql"), "mariadbd", f"--defaults-file={state.etc / 'mariadb.cnf'}")
    return _daemon(state, "mariadbd", argv, lambda: _listens(state.database_socket))


def slurmdbd(state: Sandbox) -> Daemon:
    """Accounting."""
    # Slurm has no key for the database's socket; MariaDB's client library takes it from here
    environment = {"MYSQL_UNIX_PORT": str(state.database_socket)}
    address = (str(state.head.address), DATABASE_PORT)
    argv = (*_on_head(state, "slurm"), "slurmdbd", "-D")
    return _daemon(state, "slurmdbd", argv, lambda: _answers(address), environment)


def slurmctld(state: Sandbox) -> Daemon:
    """The controller."""
    address = (str(state.head.address), CONTROLLER_PORT)
    argv = (*_on_head(state, "slurm"), "slurmctld", "-D")
    return _daemon(state, "slurmctld", argv, lambda: _answers(address))


def slurmd(state: Sandbox, node: Node) -> Daemon:
    """A node."""
    argv = (*node.enter, "slurmd", "-D", "-N", node.name)
    return _daemon(state, f"slurmd-{node.name}", argv, lambda: _answers((str(node.address), NODE_PORT)))


def all_daemons(state: Sandbox) -> list[Daemon]:
    """In the order of their start."""
    nodes = [slurmd(state, node) for node in state.nodes]
    return [munged(state), mariadbd(state), slurmdbd(state), slurmctld(state), *nodes]


def _daemon(
    state: Sandbox,
    name: str,
    argv: tuple[str, ...],
    ready: Callable[[], bool],
    environment: dict[str, str] | None = None,
) -> Daemon:
    return Daemon(
        name=name,
        argv=argv,
        log=state.log / f"{name}.log",
        file=ProcessFile(state.run / f"{name}.pid"),
        ready=ready,
        environment={"SLURM_CONF": str(state.slurm_conf), **(environment or {})},
    )


def _on_head(state: Sandbox, user: str) -> tuple[str, ...]:
    """Argv prefix: in the head's namespaces, which need root, and then as a system user."""
    return (*state.head.enter, "setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", "--")


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0


def _answers(address: tuple[str, int]) -> bool:
    with socket.socket() as client:
        client.settimeout(1)
        return client.connect_ex(address) == 0
