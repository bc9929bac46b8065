"""GPUs, CPUs, memory and ranks, against what the cluster has."""

from __future__ import annotations

from collections.abc import Iterator

from cpm_cluster.specs.checks.rules import Finding, reads
from cpm_cluster.specs.job import JobSpec
from cpm_cluster.specs.values import format_size


@reads("resources", "cluster")
def _resources_within_cluster(spec: JobSpec) -> Iterator[Finding]:
    asked, cluster = spec.resources, spec.cluster
    if cluster.scheduler == "local" and asked.nodes > 1:
        yield (
            "resources.nodes",
            f"{asked.nodes} nodes, but cluster {spec.cluster_name} is this machine alone;"
            " name a Slurm cluster, or a smaller profile",
        )
    elif cluster.nodes is not None and asked.nodes > cluster.nodes:
        yield "resources.nodes", f"{asked.nodes} nodes, but {spec.cluster_name} has {cluster.nodes}"
    if cluster.gpus_per_node == 0 and asked.gpus_per_node:
        yield (
            "resources.gpus_per_node",
            f"{asked.gpus_per_node} GPUs per node, but cluster {spec.cluster_name} has none;"
            " name a cluster with GPUs, or a profile without",
        )
        return  # the job is not for this cluster: its other figures do not matter
    if cluster.gpus_per_node is not None and asked.gpus_per_node > cluster.gpus_per_node:
        yield (
            "resources.gpus_per_node",
            f"{asked.gpus_per_node} GPUs per node, but a node of {spec.cluster_name} has {cluster.gpus_per_node};"
            " use more nodes",
        )
    if cluster.cpus_per_node is not None and (asked.cpus_per_node or 0) > cluster.cpus_per_node:
        yield (
            "resources.cpus_per_node",
            f"{asked.cpus_per_node} CPUs, but a node of {spec.cluster_name} has {cluster.cpus_per_node}",
        )
    limit = cluster.memory_per_node_bytes
    if limit is not None and (asked.memory_per_node_bytes or 0) > limit:
        yield (
            "resources.memory_per_node",
            f"{format_size(asked.memory_per_node_bytes or 0)}, but a node of {spec.cluster_name} has"
            f" {format_size(limit)}",
        )
    if asked.gpu and cluster.gpu and asked.gpu != cluster.gpu:
        yield "resources.gpu", f"{asked.gpu}, but the GPUs of {spec.cluster_name} are {cluster.gpu}; leave it out"
    if asked.shm_bytes and asked.memory_per_node_bytes and asked.shm_bytes > asked.memory_per_node_bytes:
        yield (
            "resources.shm",
            f"{format_size(asked.shm_bytes)} is more than resources.memory_per_node"
            f" ({format_size(asked.memory_per_node_bytes)}), of which /dev/shm is a part",
        )


@reads("resources", "engine")
def _ranks(spec: JobSpec) -> Iterator[Finding]:
    asked = spec.resources
    if asked.gpus_per_node and asked.processes_per_node not in (None, asked.gpus_per_node):
        yield (
            "resources.processes_per_node",
            f"{asked.processes_per_node} ranks on {asked.gpus_per_node} GPUs; a rank has one GPU: leave it out",
        )
    if asked.gpus_per_node == 0 and spec.engine in ("bmtrain", "deepspeed"):
        yield "engine", f"{spec.engine} needs GPUs; on CPUs use engine: torch"
