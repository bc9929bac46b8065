"""Resource profiles: what a class of job needs, to be named in one word."""

from __future__ import annotations

from dataclasses import dataclass

from cpm_cluster.specs.fields import DURATION, SIZE, Integer, Section, Text, key


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one job asks for."""

    nodes: int = key(Integer(1, 100_000), "number of nodes", 1)
    gpus_per_node: int = key(Integer(0, 64), "GPUs on each node")
    gpu: str | None = key(Text(expected="a name in configs/gpus.yaml"), "type of GPU; default: the cluster's", None)
    processes_per_node: int | None = key(Integer(1, 1024), "ranks on a node; default: one for each GPU", None)
    cpus_per_node: int | None = key(
        Integer(1, 4096), "CPUs on each node; default: the GPUs' share of the cluster's", None
    )
    memory_per_node_bytes: int | None = key(SIZE, "host memory on each node; /dev/shm counts in it", None)
    shm_bytes: int | None = key(SIZE, "size of /dev/shm in the container; default: computed", None)
    disk_bytes: int | None = key(SIZE, "node-local disk", None)

    @property
    def ranks_per_node(self) -> int:
        return self.processes_per_node or max(1, self.gpus_per_node)

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A named set of resources with its reason."""

    description: str = key(Text(max_length=600), "what it is for")
    resources: Resources = key(Section(Resources), "what is asked for")
    time_limit_s: int | None = key(DURATION, "time limit of a job that states none", None)
    warning: str | None = key(Text(max_length=600), "what its user must know; shown at every submission", None)
    source: str = key(Text(max_length=400), "where the figures are from", "")
