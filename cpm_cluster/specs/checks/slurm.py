"""Partition, time, nodes and options, as Slurm takes them."""

from __future__ import annotations

import re
from collections.abc import Iterator

from cpm_cluster.specs.checks.rules import Finding, reads
from cpm_cluster.specs.job import JobSpec
from cpm_cluster.specs.problems import did_you_mean, listed, quoted
from cpm_cluster.specs.values import format_duration

OWN_SBATCH_OPTIONS = {  # and the key of the job file that means it, where there is one
    "job-name": "name",
    "time": "time_limit",
    "signal": "signal_lead",
    "nodes": "resources.nodes",
    "mem": "resources.memory_per_node",
    "cpus-per-task": "resources.cpus_per_node",
    "ntasks-per-node": "resources.processes_per_node",
    **dict.fromkeys(("gres", "gpus", "gpus-per-node", "gpus-per-task"), "resources.gpus_per_node"),
    **{name: f"slurm.{name}" for name in "partition nodelist exclude account qos reservation constraint".split()},
    **dict.fromkeys(
        "ntasks tasks-per-node ntasks-per-gpu gpus-per-socket mem-per-cpu mem-per-gpu"
        " exclusive requeue no-requeue open-mode output error export propagate array wrap parsable chdir test-only wait"
        " dependency clusters quiet".split(),
        "",
    ),
}


@reads("slurm.partition", "resources.nodes", "time_limit", "cluster")
def _partition(spec: JobSpec) -> Iterator[Finding]:
    name, known = spec.slurm.partition, spec.cluster.partitions
    if spec.cluster.scheduler != "slurm" or not known:
        return  # Slurm has a default partition of its own
    if name is None:
        yield "slurm.partition", f"is missing; write one of {spec.cluster_name}'s: {listed(known)}"
        return
    if name not in known:
        yield (
            "slurm.partition",
            f"{quoted(name)} is no partition of {spec.cluster_name}; it has {listed(known)}{did_you_mean(name, known)}",
        )
        return
    partition = known[name]
    cluster_nodes = spec.cluster.nodes or spec.resources.nodes  # above these, the cluster has the word
    if partition.nodes is not None and partition.nodes < spec.resources.nodes <= cluster_nodes:
        yield (
            "resources.nodes",
            f"{spec.resources.nodes} nodes, but partition {name} has {partition.nodes}; ask for fewer, or name another",
        )
    if partition.max_time_s is not None and (spec.time_limit_s or 0) > partition.max_time_s:
        yield (
            "time_limit",
            f"{format_duration(spec.time_limit_s or 0)}, but partition {name} allows"
            f" {format_duration(partition.max_time_s)}; a run resumes from its checkpoint, so ask for less",
        )


@reads("time_limit", "signal_lead", "cluster")
def _time(spec: JobSpec) -> Iterator[Finding]:
    if spec.time_limit_s is None:
        if spec.cluster.scheduler == "slurm":
            yield "time_limit", "is missing: Slurm needs one; write time_limit: 24h"
        return
    lead = spec.signal_lead_s or spec.cluster.signal_lead_s
    if spec.cluster.scheduler == "slurm" and not 10 <= lead <= 65_535:
        yield "signal_lead", f"{format_duration(lead)}, but Slurm takes 10 s to 65,535 s (18 h)"
    if lead >= spec.time_limit_s:
        yield (
            "time_limit",
            f"{format_duration(spec.time_limit_s)} is not longer than the warning before it"
            f" (signal_lead, {format_duration(lead)}): the job would be asked to stop at its start;"
            " lengthen the one or shorten the other",
        )


@reads("slurm.nodelist", "resources.nodes")
def _node_list(spec: JobSpec) -> Iterator[Finding]:
    if spec.slurm.nodelist and (count := count_nodes(spec.slurm.nodelist)) > spec.resources.nodes:
        yield (
            "slurm.nodelist",
            f"{spec.slurm.nodelist} names {count} nodes, but resources.nodes is {spec.resources.nodes}:"
            f" Slurm would allocate them all; write nodes: {count}, or name fewer",
        )


def count_nodes(nodelist: str) -> int:
    """Nodes in a Slurm host list such as `g2001` or `g[2001-2004,2007],h1`."""
    count = 0
    for ranges in re.findall(r"[^,\[]+(?:\[([^\]]*)\])?", nodelist):
        for part in ranges.split(","):
            first, _, last = part.partition("-")
            count += max(0, int(last) - int(first)) + 1 if last else 1
    return count


@reads()
def _slurm_extra(spec: JobSpec) -> Iterator[Finding]:
    for name in spec.slurm.extra:
        # sbatch takes the beginning of an option for the option (getopt_long(3)); an exact name comes first
        meant = sorted(own for own in OWN_SBATCH_OPTIONS if own.startswith(name))[:1]
        for own in meant:
            what = "is" if own == name else f"is short for --{own}, which is"
            instead = f"write {OWN_SBATCH_OPTIONS[own]} instead" if OWN_SBATCH_OPTIONS[own] else "remove it"
            yield f"slurm.extra.{name}", f"{what} decided by cpm-cluster; {instead}"
