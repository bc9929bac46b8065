"""Clusters: the facts of a site that every job there shares."""

from __future__ import annotations

from dataclasses import dataclass

from cpm_cluster.specs.fields import DURATION, SIZE, Boolean, Choice, Integer, ListOf, MapOf, Number, Section, Text, key
from cpm_cluster.specs.image import ENV_NAME, VERSION

RUNTIMES = ("docker-rootless", "docker", "podman", "pyxis", "conda", "bare")
SLURM_NAME = Text(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*", "a Slurm name (letters, digits, _ . + -)", max_length=128)
_NODES = r"[A-Za-z0-9_.-]+(\[[0-9]+(-[0-9]+)?(,[0-9]+(-[0-9]+)?)*\])?"
NODE_LIST = Text(
    rf"{_NODES}(,{_NODES})*",
    "node names as Slurm writes them, such as g2001 or g[2001-2008]",
)
ABSOLUTE_PATH = Text(r"/[^\n]*", "an absolute path")
MODULE_NAME = Text(r"[A-Za-z0-9][A-Za-z0-9_.+/-]*", "a module name such as rootless-docker/default")


@dataclass(frozen=True, kw_only=True)
class Partition:
    """What a Slurm partition allows."""

    nodes: int | None = key(Integer(1, 100_000), "nodes in it", None)
    max_time_s: int | None = key(DURATION, "longest time limit", None)
    preemptible: bool = key(Boolean(), "jobs here can be preempted", False)


@dataclass(frozen=True, kw_only=True)
class RuntimeOffer:
    """A container runtime (or none) that the cluster's nodes have."""

    modules: tuple[str, ...] = key(ListOf(MODULE_NAME), "environment modules to load first", ())
    version: str | None = key(VERSION, "version of the engine; rootless Docker has a host network since 29.5", None)
    data_root: str | None = key(ABSOLUTE_PATH, "node-local folder for images and layers (never NFS or Lustre)", None)
    environment: str | None = key(
        Text(r"[A-Za-z0-9_./][A-Za-z0-9_./-]*", "a conda environment's name or path"), "conda: environment", None
    )
    python: str | None = key(ABSOLUTE_PATH, "bare: the Python with torch in it", None)


@dataclass(frozen=True, kw_only=True)
class Network:
    """How the nodes reach each other."""

    socket_interfaces: str | None = key(
        Text(r"[\^=]?[A-Za-z0-9_.@-]+(,[A-Za-z0-9_.@-]+)*", "interface prefixes such as eth0 or ^docker,lo"),
        "NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME",
        None,
    )
    infiniband: bool = key(Boolean(), "nodes have /dev/infiniband", False)
    topology_file: str | None = key(ABSOLUTE_PATH, "NCCL_TOPO_FILE, mounted into containers", None)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """One site."""

    scheduler: str = key(Choice(("slurm", "local")), "slurm, or local processes of this machine")
    description: str = key(Text(max_length=600), "what it is", "")
    nodes: int | None = key(Integer(1, 100_000), "number of GPU nodes", None)
    node_names: str | None = key(NODE_LIST, "their names", None)
    gpus_per_node: int | None = key(Integer(0, 64), "GPUs of a node", None)
    gpu: str | None = key(Text(expected="a name in configs/gpus.yaml"), "type of its GPUs", None)
    cpus_per_node: int | None = key(Integer(1, 4096), "CPUs of a node that a job can have", None)
    memory_per_node_bytes: int | None = key(SIZE, "host memory of a node that a job can have", None)
    gpu_request: str = key(
        Choice(("gres", "gpus-per-node")), "how this site wants GPUs asked for; Slurm takes one of the two", "gres"
    )
    partitions: dict[str, Partition] = key(
        MapOf(Section(Partition), SLURM_NAME.pattern, "a partition name"), "its partitions", factory=dict
    )
    default_partition: str | None = key(SLURM_NAME, "the partition used where a job names none", None)
    runtimes: dict[str, RuntimeOffer] = key(
        MapOf(Section(RuntimeOffer), "|".join(RUNTIMES), "a runtime"), "runtimes on its nodes, the preferred first"
    )
    image_folder: str | None = key(ABSOLUTE_PATH, "shared folder with the image archives", None)
    network: Network = key(Section(Network), "interfaces and fabric", factory=Network)
    nvlink: bool | None = key(Boolean(), "NVLink within a node; default: as usual for the GPU", None)
    driver: str | None = key(VERSION, "version of the NVIDIA driver", None)
    pretend_gpus: bool = key(Boolean(), "its GPUs are pretended, as the sandbox's: ranks compute on the CPU", False)
    requeue: bool = key(Boolean(), "jobs may be requeued (JobRequeue in slurm.conf)", True)
    signal_lead_s: int = key(DURATION, "warning before the time limit; ≥ 1.5 × the time a checkpoint takes", 600)
    default_time_s: int | None = key(DURATION, "time limit of a job that states none", None)
    env: dict[str, str] = key(
        MapOf(Text(), ENV_NAME, "a variable name"),
        "environment of every job; fabric settings belong here",
        factory=dict,
    )
    python: str | None = key(
        ABSOLUTE_PATH, "Python ≥ 3.8 on the nodes for the node agent; default: the submitter's", None
    )
    gpu_price_per_hour_usd: float | None = key(
        Number(0, 1e6), "price of a GPU hour here, in place of the catalogue's", None
    )
    source: str = key(Text(max_length=400), "where these facts are from", "")
