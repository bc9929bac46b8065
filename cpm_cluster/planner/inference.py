"""Memory of tasks evaluate and generate: the trainer's model for reading alone (training/inference/loaded.py).

Symbols: N parameters, A of a LoRA adapter that is applied beside them, w bytes of one, n ranks, L layers, h hidden,
V vocabulary, B rows at once of s tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from cpm_cluster.planner.fit import Component, Demand
from cpm_cluster.planner.setup import Setup
from cpm_cluster.planner.states import part, weight_bytes
from cpm_cluster.specs.job import JobSpec
from cpm_cluster.specs.values import version_tuple

GB = 10**9
MIB = 1 << 20
SPREAD = 0.15  # nothing has been measured yet
SYSTEM_BYTES, RANK_BYTES = 4 * GB, 3_200_000_000  # as in training, planner/host_memory.py
CPU_RANK_BYTES = 400_000_000  # as in training, planner/demands.py
MAPS_FILES_SINCE = (2, 1)  # torch.load(mmap=True)
OUTSIDE = ("CUDA context", "NCCL")
INFERENCE = "training/inference/loaded.py"
ATTENTION = "training/model/attention.py"
NO_TIME = "no time is predicted for this task"


def demands_of_inference(spec: JobSpec, setup: Setup, found: Iterable[Demand]) -> Iterator[Demand]:
    """The demands of training with those of memory as the task has them, and no checkpoints."""
    name = "decoding" if spec.generation else "forward pass"
    for demand in found:
        if demand.resource == "GPU memory":
            outside = [component for component in demand.components if component.name in OUTSIDE]
            yield _demand(demand, name, [*outside, *_model(spec, setup)])
        elif demand.resource == "host memory":
            on_card = bool(spec.resources.gpus_per_node)
            yield _demand(demand, "loading" if on_card else name, [*_host(spec, setup), *_in_ram(spec, setup)])
        elif demand.resource != "disk":
            yield demand


def _demand(like: Demand, instant: str, components: list[Component]) -> Demand:
    size = sum(component.bytes for component in components)
    low, high = round((1 - SPREAD) * size), round((1 + SPREAD) * size)
    return Demand(like.resource, like.per, instant, tuple(components), like.capacity_bytes, low, high)


def _model(spec: JobSpec, setup: Setup) -> Iterator[Component]:
    """On one rank."""
    shape, width = setup.shape, weight_bytes(setup)
    whole, adapter = width * shape.parameters, width * setup.adapter_parameters
    shards = setup.shards if setup.zero_stage else 1
    each = f"/{shards}" if setup.zero_stage else ""
    yield part("weights", f"{width}N{each}", whole / shards, INFERENCE)
    if adapter:
        yield part("adapter", f"{width}A{each}", adapter / shards, INFERENCE)
    if setup.zero_stage:
        if spec.training.zero_stage < 3:
            formula = f"{width}(N + A)" if adapter else f"{width}N"
            yield part("gathered weights", formula, whole + adapter, "torch/distributed/fsdp, not resharded")
        else:
            root = width * shape.vocabulary_matrices * shape.embedding_parameters
            yield part("gathered embeddings", f"{width}Vh for each", root, "torch/distributed/fsdp, root")
            # the one that computes, the next one, and the buffer that this arrives in
            blocks = 3 * (width * shape.parameters_per_layer + adapter / shape.layers)
            yield part("gathered blocks", f"3 × {width} × block", blocks, "torch/distributed/fsdp")
    tokens = setup.micro_batch * setup.seq_len
    inside = width * (4 * shape.hidden + 3 * shape.ffn + shape.attention_width + 2 * shape.kv_width)
    if adapter:  # an update, and the same scaled, beside what it is added to
        inside += 2 * width * max(shape.adapter_shapes[name][1] for name in setup.lora_targets)
    wide = 4 * (2 * shape.hidden + 3 * shape.attention_width)
    yield part("one block", "Bs × its tensors", (inside + wide) * tokens, "counted by tensor")
    if spec.generation:
        cache = 2 * width * shape.layers * shape.kv_width * tokens
        yield part("key/value cache", f"{2 * width}L × key width × Bs", cache, ATTENTION)
    else:
        logits = shape.vocab * (width * tokens + 8 * setup.seq_len)
        yield part("logits", f"{width}VBs, and of one row 8Vs", logits, INFERENCE)


def _host(spec: JobSpec, setup: Setup) -> Iterator[Component]:
    ranks = setup.ranks_per_node
    if not spec.resources.gpus_per_node:
        yield part("processes", f"{ranks} × {CPU_RANK_BYTES / GB:g} GB", ranks * CPU_RANK_BYTES, "measured")
        return
    yield part("system", f"{SYSTEM_BYTES / GB:g} GB", SYSTEM_BYTES, "as in training")
    yield part("processes", f"{ranks} × {RANK_BYTES / GB:g} GB", ranks * RANK_BYTES, "as in training")


def _in_ram(spec: JobSpec, setup: Setup) -> Iterator[Component]:
    """The model on ranks without a GPU; the file of the weights where torch cannot map it."""
    ranks = setup.ranks_per_node
    if not spec.resources.gpus_per_node:
        for component in _model(spec, setup):
            yield part(component.name, f"{ranks} × {component.formula}", ranks * component.bytes, component.source)
    torch = version_tuple(spec.image.torch)[:2] if spec.image else ()
    if torch and torch < MAPS_FILES_SINCE:
        size = ranks * 2 * setup.shape.parameters
        yield part("weights as they are read", f"{ranks} × 2N", size, "torch.load before 2.1")
