"""What the sandbox is: its folders, nodes, addresses and user. Names only; nothing here touches the machine."""

from __future__ import annotations

import pwd
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

DEFAULT_ROOT = Path("/var/lib/cpm-sandbox")
GPUS_PER_NODE = 8
CPUS_PER_NODE = 64
MEMORY_PER_NODE_MIB = 512 * 1024


class SandboxError(Exception):
    """The sandbox cannot be what was asked for; the message is one sentence that says why and what to do."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One thing of the sandbox, as `status` reports it."""

    name: str
    up: bool
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class Host:
    """One pretend machine: a network namespace with `eth0`, and a host-name namespace."""

    name: str
    address: IPv4Address
    folder: Path

    @property
    def netns(self) -> Path:
        """Its network namespace: a mount on this file.

        Not one of `ip netns add`: where the root file system is made shared meanwhile, as rootless containers want it,
        that mounts each twice, and cannot remove it.
        """
        return self.folder / "net"

    @property
    def uts(self) -> Path:
        """Its host-name namespace: a mount on this file."""
        return self.folder / "uts"

    @property
    def link(self) -> str:
        """The bridge's end of its cable: `ip link set <link> down` pulls the plug."""
        return f"v{self.name}"

    @property
    def enter(self) -> list[str]:
        """Argv prefix that runs a command on this machine (as root).

        Not `ip netns exec`: it remounts /sys, which hides the cgroups.
        """
        return ["nsenter", f"--net={self.netns}", f"--uts={self.uts}", "--"]


@dataclass(frozen=True, kw_only=True)
class Node(Host):
    """A machine with pretend GPUs and a slurmd."""

    index: int

    @property
    def spool(self) -> Path:
        """SlurmdSpoolDir."""
        return self.folder / "spool"

    @property
    def devices(self) -> tuple[Path, ...]:
        """Device nodes of its pretend GPUs, by index."""
        return tuple(self.folder / "dev" / f"nvidia{index}" for index in range(GPUS_PER_NODE))


@dataclass(frozen=True, kw_only=True)
class Sandbox:
    """Where everything of the sandbox is."""

    root: Path = DEFAULT_ROOT
    bridge: str = "cpmbr0"
    subnet: IPv4Network = field(default=IPv4Network("10.77.0.0/24"))
    node_names: tuple[str, ...] = tuple(f"g{number}" for number in range(2001, 2009))
    user: str = "cpm-sandbox"

    @property
    def nodes(self) -> tuple[Node, ...]:
        """The nodes, in order; addresses count from .1."""
        return tuple(
            Node(name=name, index=index, address=self.subnet[index + 1], folder=self.root / "nodes" / name)
            for index, name in enumerate(self.node_names)
        )

    @property
    def head(self) -> Host:
        """Where all daemons but slurmd run, and nobody outside this machine reaches them."""
        return Host(name="cpm-head", address=self.subnet[-3], folder=self.root / "head")

    @property
    def hosts(self) -> tuple[Host, ...]:
        """All pretend machines."""
        return (self.head, *self.nodes)

    @property
    def login_address(self) -> IPv4Address:
        """This machine as the nodes see it: the bridge's address."""
        return self.subnet[-2]

    @property
    def etc(self) -> Path:
        """Configuration files."""
        return self.root / "etc"

    @property
    def slurm_conf(self) -> Path:
        """What clients set SLURM_CONF to."""
        return self.etc / "slurm.conf"

    @property
    def run(self) -> Path:
        """Process-id files and sockets."""
        return self.root / "run"

    @property
    def munge_socket(self) -> Path:
        """Where munged of the sandbox listens."""
        return self.run / "munge" / "socket"

    @property
    def munge_key(self) -> Path:
        """The secret of munged of the sandbox."""
        return self.etc / "munge.key"

    @property
    def database_socket(self) -> Path:
        """Where MariaDB of the sandbox listens."""
        return self.run / "mariadb" / "socket"

    @property
    def gpu_table(self) -> Path:
        """The pretend GPUs, as the stand-in nvidia-smi reads them: lines `host index uuid device`."""
        return self.etc / "gpus.txt"

    @property
    def log(self) -> Path:
        """Log files of the daemons."""
        return self.root / "log"

    @property
    def bin(self) -> Path:
        """Programs that the nodes have on PATH, the stand-in nvidia-smi among them."""
        return self.root / "bin"

    @property
    def shared(self) -> Path:
        """Shared file system of the cluster, writable by everybody as /tmp is; run directories go here."""
        return self.root / "shared"

    @property
    def home(self) -> Path:
        """Home of the ordinary user."""
        return self.root / "home" / self.user

    @property
    def uid(self) -> int:
        """User id of the ordinary user."""
        return self._account().pw_uid

    @property
    def gid(self) -> int:
        """Group id of the ordinary user."""
        return self._account().pw_gid

    def _account(self) -> pwd.struct_passwd:
        try:
            return pwd.getpwnam(self.user)
        except KeyError:
            raise SandboxError(f"there is no user {self.user} on this machine; cpm sandbox up makes it") from None
