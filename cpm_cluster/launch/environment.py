"""The environment of the training: each variable with who set it."""

from __future__ import annotations

from collections.abc import Iterator

from cpm_cluster.launch.origins import set_by
from cpm_cluster.launch.plan import Setting
from cpm_cluster.launch.slurm_options import cpus_per_node
from cpm_cluster.specs.job import JobSpec
from cpm_cluster.specs.nccl import TORCH_NAMES_SINCE
from cpm_cluster.specs.values import version_tuple


def environment(spec: JobSpec, package_dir: str) -> tuple[Setting, ...]:
    """The variables, sorted by name; the later layer wins: computed, cluster, job.

    The image's own ENV lines are below all of them and stay in the image.
    """
    layers = [*_computed(spec, package_dir), *_of_cluster(spec), *_of_job(spec)]
    found = {setting.name: setting for setting in layers}
    return tuple(found[name] for name in sorted(found))


def _of_cluster(spec: JobSpec) -> Iterator[Setting]:
    for name, value in spec.cluster.env.items():
        yield Setting(name, value, set_by(spec, f"cluster.env.{name}"), f"for every job on {spec.cluster_name}")


def _of_job(spec: JobSpec) -> Iterator[Setting]:
    for name, value in spec.env.items():
        yield Setting(name, value, set_by(spec, f"env.{name}"))


def _computed(spec: JobSpec, package_dir: str) -> Iterator[Setting]:
    yield Setting("PYTHONUNBUFFERED", "1", "computed", "logs as they are written")
    if spec.engine != "command":
        yield Setting("PYTHONPATH", package_dir, "computed", "the trainer's snapshot in the run directory")
    threads = _threads_per_rank(spec)
    why = "the node's CPUs divided by its ranks; torchrun would set 1"
    yield Setting("OMP_NUM_THREADS", str(threads), "computed", why)
    if spec.resources.gpus_per_node:
        yield from _nccl(spec)
    elif spec.cluster.scheduler == "local":
        yield Setting("GLOO_SOCKET_IFNAME", "lo", "computed", "all ranks are on this machine")


def _threads_per_rank(spec: JobSpec) -> int:
    cpus = cpus_per_node(spec)
    return max(1, cpus // spec.resources.ranks_per_node) if cpus else 1


def _nccl(spec: JobSpec) -> Iterator[Setting]:
    network = spec.cluster.network
    yield Setting("NCCL_DEBUG", "WARN", "computed", "diagnosis reads NCCL's warnings; INFO costs log volume")
    # Within one node NCCL finds its way, and an older rootless Docker has none of the host's interfaces.
    if network.socket_interfaces and spec.resources.nodes > 1:
        yield from _interfaces(network.socket_interfaces, set_by(spec, "cluster.network.socket_interfaces"))
    if network.topology_file:
        origin = set_by(spec, "cluster.network.topology_file")
        yield Setting("NCCL_TOPO_FILE", network.topology_file, origin, "mounted into the container, too")
    if spec.engine != "bmtrain":
        yield from _torch_nccl(spec)


def _interfaces(listed: str, origin: str) -> Iterator[Setting]:
    why = "the interfaces between the nodes, the same on each"
    yield Setting("NCCL_SOCKET_IFNAME", listed, origin, why)
    if not listed.startswith("^"):  # Gloo takes names only, and whole ones
        yield Setting("GLOO_SOCKET_IFNAME", listed.lstrip("=").split(",")[0], origin, why)


def _torch_nccl(spec: JobSpec) -> Iterator[Setting]:
    """BMTrain calls NCCL itself: these would do nothing for it."""
    torch = version_tuple(spec.image.torch if spec.image else None)
    why = "a broken collective ends the rank, it does not hang; "
    if not torch or torch >= TORCH_NAMES_SINCE:
        yield Setting("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1", "computed", why + "the name since torch 2.2")
    if not torch or torch < TORCH_NAMES_SINCE:
        yield Setting("NCCL_ASYNC_ERROR_HANDLING", "1", "computed", why + "the name before torch 2.2")
