"""What is known of NCCL's environment variables, and what a job's settings get wrong.

Source: NVIDIA NCCL user guide, "Environment Variables" (v2.30); dates of changes from its release notes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from cpm_cluster.specs.problems import listed, nearest

if TYPE_CHECKING:
    from cpm_cluster.specs.job import JobSpec

KNOWN = frozenset(
    "NCCL_" + name
    for name in """
    ALGO BUFFSIZE CHECK_POINTERS CHECKS_DISABLE COLLNET_ENABLE COLLNET_NODE_THRESHOLD COMM_BLOCKING COMM_ID
    CONF_FILE CROSS_NIC CTA_POLICY CUMEM_ENABLE CUMEM_HOST_ENABLE DEBUG DEBUG_FILE DEBUG_SUBSYS
    DEBUG_TIMESTAMP_FORMAT DEBUG_TIMESTAMP_LEVELS DMABUF_ENABLE DUMP_ON_ERROR GRAPH_FILE GRAPH_DUMP_FILE
    GRAPH_MIXING_SUPPORT GRAPH_REGISTER HOSTID IB_ADAPTIVE_ROUTING IB_ADDR_FAMILY IB_ADDR_RANGE IB_AR_THRESHOLD
    IB_CUDA_SUPPORT IB_DATA_DIRECT IB_DISABLE IB_ECE_ENABLE IB_FIFO_TC IB_GDR_LEVEL IB_GID_INDEX IB_HCA
    IB_MERGE_NICS IB_MERGE_VFS IB_PCI_RELAXED_ORDERING IB_PKEY IB_QPS_PER_CONNECTION IB_RETRY_CNT
    IB_RETURN_ASYNC_EVENTS IB_ROCE_VERSION_NUM IB_SL IB_SPLIT_DATA_ON_QPS IB_TC IB_TIMEOUT IB_USE_INLINE
    IGNORE_CPU_AFFINITY IGNORE_DISABLED_P2P LAUNCH_MODE LAUNCH_ORDER_IMPLICIT LOCAL_REGISTER LSA_TEAM_SIZE
    MAX_CTAS MAX_NCHANNELS MAX_NRINGS MIN_CTAS MIN_NCHANNELS MIN_NRINGS MNNVL_CLIQUE_ID MNNVL_ENABLE MNNVL_UUID
    NCHANNELS_PER_NET_PEER NET NET_DISABLE_INTRA NET_FORCE_FLUSH NET_GDR_C2C NET_GDR_LEVEL NET_GDR_READ
    NET_MERGE_LEVEL NET_PLUGIN NET_SHARED_BUFFERS NET_SHARED_COMMS NSOCKS_PERTHREAD NTHREADS NVB_DISABLE
    NVLS_ENABLE NVLSTREE_MAX_CHUNKSIZE OOB_NET_ENABLE OOB_NET_IFNAME P2P_DIRECT_DISABLE P2P_DISABLE P2P_LEVEL
    P2P_LL_THRESHOLD P2P_NET_CHUNKSIZE P2P_NVL_CHUNKSIZE P2P_PCI_CHUNKSIZE PROFILER_PLUGIN PROGRESS_APPENDOP_FREQ
    PROTO PXN_C2C PXN_DISABLE RAS_ADDR RAS_ENABLE RAS_TIMEOUT_FACTOR RUNTIME_CONNECT SET_THREAD_NAME SHM_DISABLE
    SHM_USE_CUDA_MEMCPY SHM_MEMCPY_MODE SINGLE_RING_THRESHOLD SOCKET_FAMILY SOCKET_IFNAME SOCKET_NTHREADS
    SOCKET_POLL_TIMEOUT_MSEC SOCKET_RETRY_CNT SOCKET_RETRY_SLEEP_MSEC STACK_SIZE SYM_CTAS THREAD_THRESHOLDS
    TOPO_DUMP_FILE TOPO_FILE TREE_THRESHOLD TUNER_PLUGIN TUNER_CONFIG_FILE UID_STAGGER_RATE
    UID_STAGGER_THRESHOLD WARN_ENABLE_DEBUG_INFO WIN_ENABLE WIN_STRIDE WORK_ARGS_BYTES WORK_FIFO_BYTES
    ASYNC_ERROR_HANDLING BLOCKING_WAIT
    """.split()
)
PLUGIN_PREFIXES = ("NCCL_FASTRAK_", "NCCL_GPUDIRECTTCPX_", "NCCL_NET_PLUGIN_", "NCCL_OFI_")
OLD_NAMES = {
    "NCCL_IB_GDR_LEVEL": "is called NCCL_NET_GDR_LEVEL since NCCL 2.4.0",
    "NCCL_IB_CUDA_SUPPORT": "was removed in NCCL 2.4.0; use NCCL_NET_GDR_LEVEL",
    "NCCL_MIN_NCHANNELS": "is deprecated since NCCL 2.17; use NCCL_MIN_CTAS",
    "NCCL_MAX_NCHANNELS": "is deprecated since NCCL 2.17; use NCCL_MAX_CTAS",
    "NCCL_MIN_NRINGS": "is the NCCL 1 name; use NCCL_MIN_CTAS",
    "NCCL_MAX_NRINGS": "is the NCCL 1 name; use NCCL_MAX_CTAS",
}
TORCH_NAMES_SINCE = (2, 2)

Finding = tuple[str, str]  # (variable, what is wrong with it)


def lint_environment(spec: JobSpec) -> Iterator[str]:
    """Warnings about the NCCL settings of a job and its cluster, for the NCCL and torch versions of its image."""
    settings = {**spec.cluster.env, **spec.env}
    yield from _lint_image(spec, settings)
    findings = [*_lint_each(spec, settings), *_lint_fabric(spec, settings), *_lint_torch(spec, settings)]
    yield from (f"{_setter(spec, name)}: {what}" for name, what in findings)
    if spec.engine == "bmtrain" and any(name.startswith("TORCH_NCCL_") for name in spec.env):
        yield "env: BMTrain calls NCCL itself, so TORCH_NCCL_* variables do nothing for it"


def _setter(spec: JobSpec, name: str) -> str:
    """The key that sets a variable; of the cluster file with its place, which the job file does not show."""
    if name in spec.env:
        return f"env.{name}"
    origin = spec.origins.get(f"cluster.env.{name}")
    return f"cluster.env.{name} ({origin.where})" if origin else f"cluster.env.{name}"


def _version(text: str | None) -> tuple[int, ...]:
    return tuple(int(part) for part in (text or "").split("+")[0].split(".")[:2] if part.isdigit())


def _lint_each(spec: JobSpec, settings: Mapping[str, str]) -> Iterator[Finding]:
    nccl = _version(spec.image.nccl if spec.image else None)
    for name, value in settings.items():
        if name.startswith("NCCL_"):
            yield from ((name, what) for what in _lint_one(name, value, nccl))


def _lint_one(name: str, value: str, nccl: tuple[int, ...]) -> Iterator[str]:
    """What is wrong with one variable, whoever set it."""
    if name in ("NCCL_TIMEOUT", "NCCL_SOCKET_TIMEOUT"):
        yield "is in many public scripts, but NCCL has no such variable"
    elif name not in KNOWN and not name.startswith(PLUGIN_PREFIXES):
        meant = ["NCCL_" + near for near in nearest(name[5:], (known[5:] for known in KNOWN))]
        hint = f" (did you mean {listed(meant)}?)" if meant else ""
        yield f"is not a variable of NCCL{hint}"
    if name in OLD_NAMES:
        yield OLD_NAMES[name]
    if name == "NCCL_IB_GID_INDEX" and nccl >= (2, 21):
        yield "NCCL 2.21 and newer choose the GID themselves; remove it"
    cards = [card.split(":")[0] for card in value.removeprefix("^").split(",")] if "=" not in value else []
    if name == "NCCL_IB_HCA" and "mlx5_1" in cards:
        yield "names are prefixes, so mlx5_1 also means mlx5_10…; start the list with ="


def _lint_image(spec: JobSpec, settings: Mapping[str, str]) -> Iterator[str]:
    """ENV lines of the image that would decide unseen (an eth0 there: aws/deep-learning-containers#6469)."""
    for name, value in spec.image.env.items() if spec.image else ():
        if name.startswith("NCCL_") and name not in settings:
            yield f"env.{name}: the image sets it to {value}; write it here if that is not the cluster's"


def _lint_fabric(spec: JobSpec, settings: Mapping[str, str]) -> Iterator[Finding]:
    if settings.get("NCCL_IB_DISABLE") == "1" and spec.cluster.network.infiniband:
        yield "NCCL_IB_DISABLE", f"{spec.cluster_name} has InfiniBand; this sends all traffic over sockets"
    nvlink = spec.cluster.nvlink if spec.cluster.nvlink is not None else spec.gpu is not None and spec.gpu.nvlink
    if settings.get("NCCL_P2P_DISABLE") == "1" and nvlink:
        yield "NCCL_P2P_DISABLE", "the GPUs have NVLink; this sends their traffic through host memory"


def _lint_torch(spec: JobSpec, settings: Mapping[str, str]) -> Iterator[Finding]:
    torch = _version(spec.image.torch if spec.image else None)
    if torch and torch < TORCH_NAMES_SINCE:
        version = ".".join(map(str, torch))
        for name in settings:
            if name.startswith("TORCH_NCCL_"):
                yield name, f"torch {version} of the image reads {name[6:]} (new names since 2.2)"
