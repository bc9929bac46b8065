"""Lower bounds of what a job needs: enough to refuse what cannot run, not yet to promise that it runs.

Symbols: N parameters, T trained parameters, n ranks that share a sharded state.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cpm_cluster.planner.fit import Component, Demand, Fit
from cpm_cluster.planner.shared_memory import shared_memory
from cpm_cluster.specs.job import JobSpec
from cpm_cluster.specs.model import Model
from cpm_cluster.specs.problems import listed
from cpm_cluster.specs.values import format_size

MIB = 1 << 20
OPTIMIZER_STEP = "in the optimizer step"


def estimate(spec: JobSpec) -> Fit:
    """What can be said of a job before it is submitted."""
    demands = [*_model_states(spec), *_shared_memory(spec), *_checkpoints(spec)]
    advice = tuple(_advice(spec, demand) for demand in demands if demand.verdict == "does not fit")
    return Fit(tuple(demands), advice)


def trained_parameters(spec: JobSpec, model: Model) -> int:
    """T: all, or r (in + out) for each adapted layer (LoRA, Hu et al. 2021)."""
    if spec.method is None:
        return model.parameters
    shapes = model.linear_shapes()
    each = sum(sum(shapes[name]) for name in spec.method.targets if name in shapes)
    return model.layers * spec.method.rank * each


def _model_states(spec: JobSpec) -> Iterator[Demand]:
    if spec.model is None or spec.engine == "command":
        return
    on_gpu, on_host = _states(spec, spec.model)
    if spec.resources.gpus_per_node:
        capacity = spec.gpu.memory_mib * MIB if spec.gpu else None
        yield Demand("GPU memory", "GPU", OPTIMIZER_STEP, on_gpu, capacity)
    else:
        on_host += tuple(_times(component, spec.resources.ranks_per_node) for component in on_gpu)
    if on_host:
        yield Demand("host memory", "node", OPTIMIZER_STEP, on_host, spec.resources.memory_per_node_bytes)


def _states(spec: JobSpec, model: Model) -> tuple[tuple[Component, ...], tuple[Component, ...]]:
    """Weights, gradients and optimizer states: (per GPU, per node on the host)."""
    trained, width = trained_parameters(spec, model), _bytes_of_a_weight(spec)
    shared = _sharing(spec)
    parts = [] if spec.method is None else [_part("frozen weights", width, "N", model.parameters, shared.weights)]
    parts.append(_part("trained weights", width, "T", trained, shared.weights))
    if not (spec.training.offload_optimizer and spec.engine == "deepspeed"):  # which moves gradients out as they come
        parts.append(_part("gradients", width, "T", trained, shared.gradients))
    if spec.training.offload_optimizer:
        return tuple(parts), (_times(_offloaded(spec, trained), spec.resources.ranks_per_node),)
    states, source = _adam(spec)
    parts.append(_part("Adam", states, "T", trained, shared.states, source))
    return tuple(parts), ()


@dataclass(frozen=True)
class _Sharing:
    """Over how many ranks a copy of each is spread."""

    weights: int
    gradients: int
    states: int


def _sharing(spec: JobSpec) -> _Sharing:
    """ZeRO (Rajbhandari et al. 2020). BMTrain shards all at rest in both its stages, and so does our FSDP."""
    n, stage = spec.resources.world_size, spec.training.zero_stage
    if spec.engine == "bmtrain" or (spec.engine == "torch" and stage):
        stage = 3
    return _Sharing(n if stage >= 3 else 1, n if stage >= 2 else 1, n if stage >= 1 else 1)


def _bytes_of_a_weight(spec: JobSpec) -> int:
    """Our torch engine keeps fp32 weights and casts them as it computes."""
    return 4 if spec.training.precision == "fp32" or spec.engine == "torch" else 2


def _adam(spec: JobSpec) -> tuple[int, str]:
    """Bytes for each trained parameter (two moments, master copy), and the source."""
    if _bytes_of_a_weight(spec) == 4:
        return 8, "moments in fp32"
    if spec.engine == "bmtrain" and spec.training.precision == "fp16":
        return 10, "moments 2 + 4, master copy 4: bmtrain/optim/adam.py"
    return 12, "moments 4 + 4, master copy 4: mixed precision, Rajbhandari et al. 2020"


def _offloaded(spec: JobSpec, trained: int) -> Component:
    """What an optimizer on the CPU keeps there, for each rank."""
    source = {
        "bmtrain": "AdamOffload: moments 4 + 4, master copy 4, pinned 2 + 2: bmtrain/optim/adam_offload.py",
        "deepspeed": "moments 4 + 4, master copy 4, gradient 4: ZeRO-Offload, Ren et al. 2021",
    }
    return _part("Adam on the host", 16, "T", trained, spec.resources.world_size, source[spec.engine])


def _part(name: str, width: int, symbol: str, count: int, ranks: int, source: str = "") -> Component:
    formula = f"{width}{symbol}" + (f"/{ranks}" if ranks > 1 else "")
    return Component(name, width * count // ranks, f"{formula} ({source})" if source else formula)


def _times(component: Component, ranks: int) -> Component:
    return Component(component.name, component.bytes * ranks, f"{ranks} ranks × {component.formula}")


def _shared_memory(spec: JobSpec) -> Iterator[Demand]:
    """The limit that a container gets; without one, or with ipc: host, the node's own counts."""
    if spec.image is None or spec.container.ipc == "host":
        return
    size = shared_memory(spec)
    limit = (Component("NCCL", size.bytes, size.why),)
    capacity = spec.resources.memory_per_node_bytes
    yield Demand("/dev/shm", "node", "all the time", limit, capacity, upper_bytes=size.bytes)


def _checkpoints(spec: JobSpec) -> Iterator[Demand]:
    """fp32 weights and two moments of what is trained, kept checkpoints and the one being written."""
    if spec.model is None or spec.engine == "command":
        return
    kept = spec.training.checkpoint.keep + 1
    size = 12 * trained_parameters(spec, spec.model) * kept
    component = Component("checkpoints", size, f"12T × {kept} (keep {kept - 1}, one being written)")
    yield Demand("disk", "run", "while saving", (component,), None, upper_bytes=size)


def _advice(spec: JobSpec, demand: Demand) -> str:
    needed, have = demand.size, format_size(demand.capacity_bytes or 0)
    remedies = {"GPU memory": _less_on_gpus, "host memory": _less_on_hosts}[demand.resource](spec, demand)
    return f"{demand.resource}: {needed} for each {demand.per}, but there are {have}; use {listed(remedies)}"


def _less_on_gpus(spec: JobSpec, demand: Demand) -> Iterator[str]:
    """What is not in force yet."""
    if _sharing(spec).weights > 1:
        yield _more_nodes(spec, demand, spec.resources.gpus_per_node)
    elif spec.engine != "bmtrain":
        yield "training.zero_stage: 3"
    if spec.method is None:
        yield "method: lora"
    if spec.engine in ("bmtrain", "deepspeed") and not spec.training.offload_optimizer:
        yield "training.offload_optimizer: true"
    yield "a GPU with more memory"


def _less_on_hosts(spec: JobSpec, demand: Demand) -> Iterator[str]:
    yield _more_nodes(spec, demand, 1) if spec.resources.gpus_per_node else "nodes with more memory"
    if spec.training.offload_optimizer:
        yield "training.offload_optimizer: false"
    if spec.method is None:
        yield "method: lora"


def _more_nodes(spec: JobSpec, demand: Demand, holders: int) -> str:
    """As many as hold the whole, where each of a node's `holders` has the capacity; all of it is sharded."""
    whole = demand.lower_bytes * holders * spec.resources.nodes
    return f"{-(-whole // (holders * (demand.capacity_bytes or 1)))} nodes or more"
