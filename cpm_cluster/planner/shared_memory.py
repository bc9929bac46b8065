"""How large /dev/shm must be in a container."""

from __future__ import annotations

from dataclasses import dataclass

from cpm_cluster.specs.job import JobSpec
from cpm_cluster.specs.values import format_size

# NCCL's buffers for one peer and channel: LL + LL128 + SIMPLE (NCCL_BUFFSIZE) + flags, bytes (nccl#290, #1518).
NCCL_SEGMENT_BYTES = 524_288 + 4_915_200 + 4_194_304 + 4_096
SEGMENTS_PER_CHANNEL = 3  # ring and tree
CHANNELS_WITHOUT_P2P = 16
CHANNELS_WITH_NVLINK = 2  # what is left where peer access is refused
MARGIN = 1.5
# The CPM-9G manual's --shm-size; docker's own default of 64 MB ends NCCL with SIGBUS (DeepSpeed#4002).
FLOOR_BYTES = 4 << 30


@dataclass(frozen=True)
class SharedMemory:
    """`bytes` of /dev/shm on a node, and how they came about."""

    bytes: int
    set_by: str
    why: str


def shared_memory(spec: JobSpec) -> SharedMemory:
    """The size that the job states, or max(floor, 1.5 × NCCL's segments) rounded up to GiB, within the job's memory.

    NCCL's segments: GPUs × channels × 3 × 9,637,888 B. Our loader keeps its batches in each rank's own memory.
    """
    stated = spec.resources.shm_bytes
    if stated is not None:
        return SharedMemory(stated, str(spec.origins["resources.shm"]), "as stated in resources.shm")
    gpus = spec.resources.gpus_per_node
    nvlink = spec.cluster.nvlink if spec.cluster.nvlink is not None else bool(spec.gpu and spec.gpu.nvlink)
    channels = CHANNELS_WITH_NVLINK if nvlink else CHANNELS_WITHOUT_P2P
    nccl = gpus * channels * SEGMENTS_PER_CHANNEL * NCCL_SEGMENT_BYTES
    needed = max(FLOOR_BYTES, -(-int(MARGIN * nccl) >> 30) << 30)
    memory = spec.resources.memory_per_node_bytes
    why = (
        f"NCCL: {gpus} GPUs × {channels} channels × {SEGMENTS_PER_CHANNEL} × {NCCL_SEGMENT_BYTES:,} B"
        f" = {format_size(nccl)}, × {MARGIN}, at least the manual's {format_size(FLOOR_BYTES)}, in whole GiB"
    )
    if memory is not None and memory < needed:
        return SharedMemory(memory, "computed", f"{why}, but no more than resources.memory_per_node")
    return SharedMemory(needed, "computed", why)
