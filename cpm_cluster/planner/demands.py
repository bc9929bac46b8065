"""What a job needs of GPUs, hosts, /dev/shm, disks and time, by the models of memory and of time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from cpm_cluster.planner.calibration import (
    Calibration,
    calibrated_gpu,
    calibrated_host,
    calibrated_time,
    host_spread,
)
from cpm_cluster.planner.fit import Component, Demand, RunTime
from cpm_cluster.planner.gpu_memory import GpuMemory, Instant, gpu_memory, gpu_need
from cpm_cluster.planner.host_memory import GATHERED, HostInstant, host_memory, spread_of
from cpm_cluster.planner.host_memory import SPREAD as HOST_SPREAD
from cpm_cluster.planner.job_setup import as_loaded, host_capacity
from cpm_cluster.planner.memory_constants import MIB
from cpm_cluster.planner.setup import Setup
from cpm_cluster.planner.shared_memory import shared_memory
from cpm_cluster.planner.states import DTYPE, part, weight_bytes
from cpm_cluster.planner.step_time import step_time
from cpm_cluster.specs.job import JobSpec

GB = 10**9
# A rank without a GPU: Python and torch; 0.38 GB with 1.2e6 parameters in training, measured with torch 2.13.
CPU_RANK_BYTES = 400_000_000
CPU_SPREAD = 0.3
# Of our torch engine; a program that a job describes below `workload` is taken for like it, which is on the safe side.
OURS = ("fsdp", "ddp")
TORCH_ENGINE = "training/engines/torch_engine.py"
STAGING = "training/engines/staging.py"
ATTENTION = "training/model/attention.py"


def demands(spec: JobSpec, setup: Setup | None, calibration: Calibration | None = None) -> Iterator[Demand]:
    """Of a job and its setup; without a setup, what does not depend on what computes."""
    if setup is not None:
        if spec.resources.gpus_per_node:
            yield gpu_demand(setup, calibration)
            yield host_demand(setup, host_capacity(spec), spec.engine != "command", calibration)
        else:
            yield cpu_demand(setup, host_capacity(spec))
    yield from _shared_memory(spec)
    if setup is not None:
        yield _checkpoints(spec, setup)
    yield from _image(spec)


def gpu_demand(setup: Setup, calibration: Calibration | None = None) -> Demand:
    memory = card_memory(setup, calibration)
    capacity = setup.gpu_memory_mib * MIB or None
    binding = memory.binding
    return Demand("GPU memory", "GPU", binding.name, binding.components, capacity, memory.low, memory.high)


def card_memory(setup: Setup, calibration: Calibration | None = None) -> GpuMemory:
    """What a card must have."""
    return calibrated_gpu(calibration, setup, lambda one: in_our_engine(gpu_need(one), one))


def host_demand(setup: Setup, capacity: int | None, ours: bool, calibration: Calibration | None = None) -> Demand:
    """`ours`: the program is our trainer, which copies its state before it is written."""
    binding = node_memory(setup, ours, calibration)
    spread = host_spread(calibration, setup, binding)
    if spread_of(setup) > HOST_SPREAD:  # of what no calibration has seen
        spread = max(spread, spread_of(setup))
    low, high = round(binding.bytes * (1 - spread)), round(binding.bytes * (1 + spread))
    return Demand("host memory", "node", binding.name, binding.components, capacity, low, high)


def node_memory(setup: Setup, ours: bool, calibration: Calibration | None = None) -> HostInstant:
    """The fullest moment of a node."""
    instants = host_memory(as_loaded(setup)).instants
    if ours and setup.mode != "infer":
        *others, saving = instants
        instants = (*others, *_saves(setup, saving))
    return max((calibrated_host(calibration, setup, one) for one in instants), key=lambda instant: instant.bytes)


def cpu_demand(setup: Setup, capacity: int | None) -> Demand:
    """Without GPUs, what would be on them is in the memory of the node, once for each rank."""
    ranks = setup.ranks_per_node
    memory = in_our_engine(gpu_memory(replace(setup, metric="allocated")), setup)
    binding = memory.binding
    base = part("processes", f"{ranks} × {CPU_RANK_BYTES / GB:g} GB", ranks * CPU_RANK_BYTES, "measured")
    each = tuple(_times(component, ranks) for component in binding.components)
    low = round((1 - CPU_SPREAD) * base.bytes) + ranks * memory.low
    high = round((1 + CPU_SPREAD) * base.bytes) + ranks * memory.high
    return Demand("host memory", "node", binding.name, (base, *each), capacity, low, high)


def run_time(spec: JobSpec, setup: Setup, calibration: Calibration | None = None) -> RunTime | None:
    """None on CPUs, of which no rate is known: real ones, and those behind pretended GPUs."""
    if not spec.resources.gpus_per_node or spec.cluster.pretend_gpus:
        return None
    cluster = spec.cluster
    return RunTime(
        step=calibrated_time(calibration, setup, step_time(setup, spec.gpu)),
        steps=spec.training.steps,
        limit_s=spec.time_limit_s,
        warning_s=spec.signal_lead_s or cluster.signal_lead_s,
        starts_again=cluster.scheduler == "slurm",  # the batch script sees to it, whatever JobRequeue says
    )


def in_our_engine(memory: GpuMemory, setup: Setup) -> GpuMemory:
    """What our torch engine holds beyond what the model of its kind counts, on top of every instant.

    It keeps adapters, and what is frozen beside the linear layers, in fp32, and casts as it computes: the model of
    adapters counts 2 bytes of each. Rows are packed, and SDPA is told by a mask which documents may see each other.
    """
    if setup.engine not in OURS or setup.mode == "infer":
        return memory
    lasting, passing = _wide_weights(setup), _masks(setup)

    def wider(instant: Instant) -> Instant:
        return replace(instant, lasting=(*instant.lasting, *lasting), passing=(*instant.passing, *passing))

    return GpuMemory(tuple(map(wider, memory.instants)))


def _wide_weights(setup: Setup) -> tuple[Component, ...]:
    if not setup.trains_adapters or setup.precision == "fp32":
        return ()
    ranks = setup.shards if setup.zero_stage else 1
    # FSDP2 takes weights of several types in a unit from torch 2.9 on (training/model/lora.py)
    all_wide = bool(setup.zero_stage) and setup.torch_version < (2, 9)
    count = setup.shape.parameters if all_wide else setup.shape.embedding_parameters
    formula = "2N more" if all_wide else "2Vh more"
    frozen = part("frozen weights in fp32", formula, 2 * count / ranks, TORCH_ENGINE)
    if not setup.zero_stage:
        return (frozen,)
    return frozen, part("adapters in fp32", "8T more", 8 * setup.trained_parameters / ranks, TORCH_ENGINE)


def _masks(setup: Setup) -> tuple[Component, ...]:
    """A number for each pair of positions, made once for all blocks: 0, or -inf where there is nothing to be seen.

    Where keys and values are repeated for all heads, each block saves them (model/attention.py). Kernels that are
    told where documents begin need neither.
    """
    if not setup.row_masks:
        return ()
    width, shape = weight_bytes(setup), setup.shape
    pairs = setup.micro_batch * setup.seq_len**2
    parts = [part("mask of packed rows", f"{width} × micro batch × s²", width * pairs, ATTENTION)]
    repeated = shape.attention_width - shape.kv_width
    if repeated:
        blocks = 1 if setup.recompute == "full" else shape.layers
        size = 2 * width * setup.tokens * repeated * blocks
        parts.append(part("keys and values of all heads", f"{2 * width}T × repeated × blocks", size, ATTENTION))
    return tuple(parts)


def _saves(setup: Setup, saving: HostInstant) -> Iterator[HostInstant]:
    """Of our trainer: each rank copies its part of the state before it is written; in the end rank 0 gathers weights.

    BMTrain gathers them in their own type (bmtrain/store.py), our torch engine in fp32.
    """
    kept = tuple(c for c in saving.components if c.name != GATHERED)
    trained = setup.trained_parameters
    if not setup.offload_optimizer:  # what is there already is written from where it is
        staged = 12 * trained * setup.ranks_per_node / setup.dp
        copies = part("state copied for checkpoints", "12T × ranks of the node / ranks", staged, STAGING)
        yield HostInstant(saving.name, (*kept, copies))
    if setup.engine in OURS:
        gathered = part("trained weights on rank 0", "4T", 4 * trained, TORCH_ENGINE)
        yield HostInstant("saving the weights", (*kept, gathered))
    else:
        yield HostInstant("saving the weights", saving.components)


def _times(component: Component, ranks: int) -> Component:
    formula = f"{ranks} ranks × {component.formula}" if ranks > 1 else component.formula
    return Component(component.name, component.bytes * ranks, formula, component.source)


def _shared_memory(spec: JobSpec) -> Iterator[Demand]:
    """The limit that a container gets; without one, or with ipc: host, the node's own counts."""
    if spec.image is None or spec.container.ipc == "host":
        return
    size = shared_memory(spec)
    limit = (Component("NCCL", size.bytes, size.why),)
    capacity = spec.resources.memory_per_node_bytes
    yield Demand("/dev/shm", "node", "all the time", limit, capacity, size.bytes, size.bytes)


def _checkpoints(spec: JobSpec, setup: Setup) -> Demand:
    """fp32 weights and both moments of what is trained: those that are kept, the one being written, the weights."""
    kept = spec.training.checkpoint.keep + 1
    trained = setup.trained_parameters
    components = (
        part("checkpoints", f"12T × {kept} (keep {kept - 1}, one being written)", 12 * trained * kept, DTYPE),
        part("weights at the end", "4T", 4 * trained, DTYPE),
    )
    size = sum(component.bytes for component in components)
    return Demand("disk", "run", "while saving", components, None, size, size)


def _image(spec: JobSpec) -> Iterator[Demand]:
    """The archive is uncompressed layers (docker save), so that the loaded image is as large."""
    archive = spec.image.archive if spec.image else None
    if archive is None or archive.bytes is None:
        return
    layers = (part("image", "size of the archive", archive.bytes, "docker save"),)
    yield Demand("node disk", "node", "after loading", layers, spec.resources.disk_bytes, archive.bytes, archive.bytes)
