"""Host memory of a node as the control group counts it: while loading, in training, and while rank 0 saves.

Symbols: N parameters, T trained parameters, n data-parallel ranks, part = T/n. Pinned buffers are shared memory, which
`free` doesn't count as used (pytorch#150517), but a control group does (shmem in memory.stat).
"""

from __future__ import annotations

from dataclasses import dataclass

from cpm_cluster.planner.deepspeed_states import STAGE_2, STAGE_3, SUB_GROUP, deepspeed_version
from cpm_cluster.planner.fit import Component
from cpm_cluster.planner.setup import Setup
from cpm_cluster.planner.states import QUANTISED_BYTES, moment_bytes, moments_name, part, weight_bytes

GB = 10**9
SYSTEM_GB = 4.0  # operating system, container, launcher
RANK_GB = 3.2  # a rank in training: interpreter, torch, the host side of CUDA and NCCL
LOADING_RANK_GB = 2.0  # before it has used its GPU
LOADING = 1.3  # a model that is read whole: itself and a part of the file
GATHERED = "the model on rank 0"
PINNED_POOL = 1.28  # many pinned tensors of different sizes, each rounded up
SPREAD = 0.15  # of all terms together, on the host readings of measured_runs.csv
SPREAD_FSDP = 0.25  # the same with FSDP's offloading, of which that table has a single reading
FITTED = "fitted, see planner/host_memory.py"
ADAM_OFFLOAD = "bmtrain/optim/adam_offload.py"
PINS_THE_MASTER_COPY = (0, 14, 1)  # pin_memory(weights_partition) in stage_1_and_2.py, whatever the configuration says
KEEPS_HALF_WEIGHTS = (0, 17, 0)  # param_buffer_of_bit16_for_cpu_offload_groups in stage_1_and_2.py
FSDP_PINS = "torch/distributed/fsdp/_flat_param.py, pin_memory"
ZERO_OFFLOAD = "ZeRO-Offload, Ren et al. 2021"
Parts = tuple[Component, ...]


@dataclass(frozen=True)
class HostInstant:
    """What one node holds at one moment."""

    name: str
    components: Parts

    @property
    def bytes(self) -> int:
        return sum(component.bytes for component in self.components)


@dataclass(frozen=True)
class HostMemory:
    instants: tuple[HostInstant, ...]
    spread: float = SPREAD

    @property
    def binding(self) -> HostInstant:
        """The fullest: what the node must hold."""
        return max(self.instants, key=lambda instant: instant.bytes)

    @property
    def observed(self) -> HostInstant:
        """The fullest of a run that is watched, without its saves."""
        return max(self.instants[:-1], key=lambda instant: instant.bytes)

    @property
    def high(self) -> float:
        return self.binding.bytes * (1 + self.spread)


def host_memory(setup: Setup) -> HostMemory:
    ranks = setup.ranks_per_node
    base = _processes(ranks, RANK_GB)
    offloaded = tuple(
        Component(c.name, c.bytes * ranks, f"{ranks} ranks × {c.formula}" if ranks > 1 else c.formula, c.source)
        for c in _offloaded(setup)
    )
    return HostMemory(
        (
            HostInstant("loading", (*_processes(ranks, LOADING_RANK_GB), _loaded(setup), *_sharded_as_loaded(setup))),
            HostInstant("training", (*base, *offloaded)),
            HostInstant("saving", (*base, *offloaded, *_gathered_to_save(setup))),
        ),
        spread_of(setup),
    )


def spread_of(setup: Setup) -> float:
    return SPREAD_FSDP if setup.engine == "fsdp" and (setup.offload_param or setup.offload_optimizer) else SPREAD


def _processes(ranks: int, each_gb: float) -> Parts:
    return (
        part("system", f"{SYSTEM_GB:g} GB", SYSTEM_GB * GB, FITTED),
        part("processes", f"{ranks} × {each_gb:g} GB", ranks * each_gb * GB, FITTED),
    )


def pinned(setup: Setup, size: float) -> float:
    """A pinned buffer is as large as the next power of two (torch since 1.11, pytorch#95823)."""
    return power_of_two(size) if setup.pin_memory else size


def power_of_two(size: float) -> float:
    return float(1 << max(0, round(size) - 1).bit_length())


def _loaded(setup: Setup) -> Component:
    """Every rank builds the model, unless it is partitioned as it is built, or rank 0 reads it alone."""
    width = _loaded_bytes(setup)
    sharded = setup.zero_stage >= 3 and setup.zero_init and not setup.quantised
    factor = 1.0 if sharded else LOADING
    everyone = setup.engine == "deepspeed" and not sharded
    one_reads = setup.engine == "fsdp" and setup.zero_init  # the others build on meta (sync_module_states)
    everyone = everyone or setup.engine == "ddp" or (setup.quantised and not one_reads) or not setup.zero_init
    readers = setup.ranks_per_node if everyone else 1
    size = readers * factor * width * setup.shape.parameters / (setup.tp * setup.pp)
    return part(
        "weights as they are read",
        f"{readers} × {factor:g} × {width:.3g}N",
        size,
        "DeepSpeedExamples#498; 1.3 is fitted",
    )


def _loaded_bytes(setup: Setup) -> float:
    if setup.quantised:
        outside = setup.shape.vocabulary_matrices * setup.shape.embedding_parameters / setup.shape.parameters
        return QUANTISED_BYTES[setup.precision] * (1 - outside) + 2 * outside
    if setup.engine in ("bmtrain", "megatron") or setup.loads_half or setup.trains_adapters:
        return weight_bytes(setup)
    return 4 if setup.engine in ("deepspeed", "ddp") else weight_bytes(setup)


def _offloaded(setup: Setup) -> list[Component]:
    """By one rank."""
    if not (setup.offload_optimizer or setup.offload_param) or (setup.engine == "deepspeed" and not setup.zero_stage):
        return []
    if setup.engine == "fsdp":
        return _fsdp_offloaded(setup)
    return _bmtrain_offloaded(setup) if setup.engine == "bmtrain" else _deepspeed_offloaded(setup)


def _bmtrain_offloaded(setup: Setup) -> list[Component]:
    """Two pinned buffers for the part of each tensor, whatever the job says of pinning."""
    trained = setup.trained_parameters / setup.shards
    pinned_bytes = 4 * trained * _rounding_of_parts(setup)
    return [
        part("master copy and moments", "12T" + _over(setup), 12 * trained, ADAM_OFFLOAD),
        part("pinned weights and gradients", "2 p2(2 × part of each tensor)", pinned_bytes, ADAM_OFFLOAD),
    ]


def _fsdp_offloaded(setup: Setup) -> list[Component]:
    """Each unit's shard is pinned, and a gradient of its size, trained or not, whatever the job says of pinning."""
    width = _fsdp_width(setup)
    trained = setup.trained_parameters / _ranks_that_divide(setup)
    parts = []
    if setup.offload_param:
        pinned_shards = sum(count * power_of_two(size) for count, size in _fsdp_units(setup))
        parts.append(part("weights", "p2(part of each block)", pinned_shards, FSDP_PINS))
        if setup.mode != "infer":
            parts.append(part("gradients", "p2(part of each block)", pinned_shards, FSDP_PINS))
    each = moment_bytes(setup, width)
    parts.append(part(moments_name(setup), f"{each} × part", each * trained, ZERO_OFFLOAD))
    return parts


def _fsdp_width(setup: Setup) -> int:
    return 2 if setup.precision.endswith("_pure") or setup.trains_adapters else 4


def _fsdp_units(setup: Setup) -> tuple[tuple[int, float], ...]:
    """(how many, bytes of one rank's shard): blocks, what is outside of them, adapters."""
    shape, n, width = setup.shape, _ranks_that_divide(setup), _fsdp_width(setup)
    block = QUANTISED_BYTES.get(setup.precision, width) * shape.parameters_per_layer / n
    outside = width * shape.vocabulary_matrices * shape.embedding_parameters / n
    adapters = width * setup.trained_parameters / n / shape.layers if setup.trains_adapters else 0.0
    return (shape.layers, block), (1, outside), (shape.layers, adapters)


def _sharded_as_loaded(setup: Setup) -> Parts:
    """Rank 0 holds the whole model while the shards of all ranks are made from it."""
    if setup.engine != "fsdp" or not setup.offload_param:
        return ()
    size = setup.ranks_per_node * sum(count * size for count, size in _fsdp_units(setup))
    return (part("shards of all ranks", "weights/n × ranks", size, "torch/distributed/fsdp, sync_module_states"),)


def _rounding_of_parts(setup: Setup) -> float:
    """How much larger pinned buffers are than what they hold, over the ranks of one node.

    A block lies flat over the ranks: of some tensors a rank holds a part, of others all or nothing.
    """
    if setup.mode != "full":
        return PINNED_POOL
    shape, n = setup.shape, setup.shards
    tensors = [rows * columns for rows, columns in shape.linear_shapes.values()]
    part_of_block = sum(tensors) / n
    held = rounded = 0.0
    for rank in range(min(setup.ranks_per_node, n)):
        end = 0.0
        for size in tensors:
            start, end = end, end + size
            own = min(end, (rank + 1) * part_of_block) - max(start, rank * part_of_block)
            if own >= 1:
                held += shape.layers * own
                rounded += shape.layers * power_of_two(2 * own) / 2
        own = shape.embedding_parameters / n
        held += shape.vocabulary_matrices * own
        rounded += shape.vocabulary_matrices * power_of_two(2 * own) / 2
    return rounded / held


def _ranks_that_divide(setup: Setup) -> int:
    """Data-parallel ranks, and those of a pipeline and of tensors, which hold a part of the model in any case."""
    return setup.shards * setup.tp * setup.pp


def _over(setup: Setup) -> str:
    return f"/{setup.shards}" if setup.shards > 1 else ""


def _deepspeed_offloaded(setup: Setup) -> list[Component]:
    width, share = weight_bytes(setup), setup.trained_parameters / _ranks_that_divide(setup)
    parts = []
    if setup.offload_optimizer and setup.mode != "infer":
        moments = moment_bytes(setup, 4)
        states = moments + (4 if width == 2 else 0)
        if setup.zero_stage >= 3:
            parts.append(part("master copy and moments", f"{states} × part", states * share, ZERO_OFFLOAD))
            parts += _stage_3_gradients(setup, share)
        else:
            parts += _stage_2_weights(setup, share)
            parts.append(part(moments_name(setup), f"{moments} × part", moments * share, ZERO_OFFLOAD))
            parts.append(part("fp32 gradients", "p2(4 × part)", pinned(setup, 4 * share), STAGE_2))
            if setup.accumulates:
                pool = PINNED_POOL if setup.pin_memory else 1.0
                parts.append(part("accumulated gradients", f"{2 * pool:g} × part", 2 * pool * share, STAGE_2))
    if setup.offload_param and setup.zero_stage >= 3:
        parts += _offloaded_weights(setup)
    return parts


def _stage_2_weights(setup: Setup, share: float) -> list[Component]:
    """The fp32 master copy, and since 0.17 the half-precision weights on their way to the GPU."""
    version = deepspeed_version(setup)
    parts = []
    if weight_bytes(setup) == 2:
        pins = version >= PINS_THE_MASTER_COPY
        size = power_of_two(4 * share) if pins else 4 * share
        parts.append(part("master copy", "p2(4 × part)" if pins else "4 × part", size, STAGE_2))
    if version >= KEEPS_HALF_WEIGHTS:
        width = weight_bytes(setup)
        parts.append(
            part("weights to be sent", f"p2({width} × part)", pinned(setup, width * share), STAGE_2 + ", since 0.17")
        )
    return parts


def _stage_3_gradients(setup: Setup, share: float) -> list[Component]:
    """One fp32 buffer for each group of parameters that is stepped at once, and the half-precision gradients."""
    groups, rest = divmod(share, SUB_GROUP)
    buffers = groups * pinned(setup, 4 * SUB_GROUP) + (pinned(setup, 4 * rest) if rest else 0.0)
    return [
        part("fp32 gradients", "p2(4 × 10^9) for each sub-group", buffers, STAGE_3),
        part("gradients", "p2(2 × part)", pinned(setup, weight_bytes(setup) * share), STAGE_3),
    ]


def _offloaded_weights(setup: Setup) -> list[Component]:
    if setup.trains_adapters or setup.mode == "infer":
        width = QUANTISED_BYTES.get(setup.precision, weight_bytes(setup))
        size = width * setup.shape.parameters / _ranks_that_divide(setup)
        return [part("frozen weights", f"{width:g}N" + _over(setup), pinned(setup, size), STAGE_3)]
    width = weight_bytes(setup)
    share = setup.shape.parameters / _ranks_that_divide(setup)  # frozen ones of a reward model as well
    return [
        part("weights", f"p2({width} × part)", pinned(setup, width * share), STAGE_3),
        part("weights by tensor", f"{width} × part", width * share, "deepspeed/runtime/zero/partition_parameters.py"),
    ]


def _gathered_to_save(setup: Setup) -> Parts:
    """Rank 0 of the node holds the whole state dict (bmt.save, FSDP, DeepSpeed when asked)."""
    if setup.mode == "infer" or setup.gpus == 1 or setup.engine in ("none", "ddp", "megatron"):
        return ()
    count = setup.trained_parameters if setup.trains_adapters else setup.shape.parameters
    size = weight_bytes(setup) * count
    return (part(GATHERED, f"{weight_bytes(setup)}N", size, "bmtrain/store.py; torch, full state dict"),)
