"""Lower bounds of what a job needs: enough to refuse what cannot run, not yet to promise that it runs.

Symbols: N parameters, T trained parameters, n ranks that share a sharded state.
"""

from __future__ import annotations

from collections.abc import Iterator

from cpm_cluster.planner.fit import Component, Demand, Fit
from cpm_cluster.planner.shared_memory import shared_memory
from cpm_cluster.specs.job import JobSpec
from cpm_cluster.specs.model import Model
from cpm_cluster.specs.values import format_size

MIB = 1 << 20


def estimate(spec: JobSpec) -> Fit:
    """What can be said of a job before it is submitted."""
    demands = [*_model_states(spec), _shared_memory(spec), *_checkpoints(spec)]
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
        yield Demand("GPU memory", "GPU", "between two steps", on_gpu, capacity)
    else:
        on_host += tuple(_times(component, spec.resources.ranks_per_node) for component in on_gpu)
    if on_host:
        yield Demand("host memory", "node", "between two steps", on_host, spec.resources.memory_per_node_bytes)


def _states(spec: JobSpec, model: Model) -> tuple[tuple[Component, ...], tuple[Component, ...]]:
    """Weights, gradients and optimizer states: (per GPU, per node on the host)."""
    n, stage = spec.resources.world_size, spec.training.zero_stage
    trained, frozen = trained_parameters(spec, model), 0
    if spec.method is not None:
        frozen = model.parameters
    width = 4 if spec.training.precision == "fp32" or spec.engine == "torch" else 2
    sharded = n if spec.engine == "bmtrain" or stage == 3 else 1
    parts = [Component("frozen weights", width * frozen // sharded, f"{width}N/{sharded}")] if frozen else []
    if spec.training.offload_optimizer:
        parts.append(Component("weights and gradients", 4 * trained // sharded, f"4T/{sharded}, AdamOffload"))
        ranks = spec.resources.ranks_per_node
        host = Component(
            "Adam on the host", 16 * trained * ranks // n, f"16T/{n} × {ranks} ranks (bmtrain/optim/adam_offload.py)"
        )
        return tuple(parts), (host,)
    states, formula = _training_states(spec)
    sharded_states = n if sharded > 1 or stage >= 1 else 1
    weights = width * trained // sharded
    rest = (states - width) * trained // sharded_states
    parts.append(Component("trained weights", weights, f"{width}T/{sharded}"))
    parts.append(Component("gradients and Adam", rest, f"{states - width}T/{sharded_states}, {formula}"))
    return tuple(parts), ()


def _training_states(spec: JobSpec) -> tuple[int, str]:
    """Bytes for each trained parameter: weight, gradient, moments, master copy."""
    if spec.engine == "bmtrain":
        return (
            (16, "BMTrain bf16") if spec.training.precision == "bf16" else (14, "BMTrain fp16 (bmtrain/optim/adam.py)")
        )
    return 16, "fp32 Adam 4+4+8" if spec.engine == "torch" else "mixed precision Adam 2+2+12 (Rajbhandari et al. 2020)"


def _times(component: Component, ranks: int) -> Component:
    return Component(component.name, component.bytes * ranks, f"({component.formula}) × {ranks} ranks")


def _shared_memory(spec: JobSpec) -> Demand:
    size = shared_memory(spec)
    component = Component("NCCL and loader", size.bytes, size.why)
    return Demand(
        "/dev/shm", "node", "all the time", (component,), spec.resources.memory_per_node_bytes, upper_bytes=size.bytes
    )


def _checkpoints(spec: JobSpec) -> Iterator[Demand]:
    """fp32 weights and two moments of what is trained, kept checkpoints and the one being written."""
    if spec.model is None or spec.engine == "command":
        return
    kept = spec.training.checkpoint.keep + 1
    size = 12 * trained_parameters(spec, spec.model) * kept
    component = Component("checkpoints", size, f"12T × {kept} (keep {kept - 1}, one being written)")
    yield Demand("disk", "run", "while saving", (component,), None, upper_bytes=size)


def _advice(spec: JobSpec, demand: Demand) -> str:
    needed, have = format_size(demand.lower_bytes), format_size(demand.capacity_bytes or 0)
    how = {
        "GPU memory": "use more GPUs, method lora, training.zero_stage 3, or training.offload_optimizer",
        "host memory": "use more nodes, or training.offload_optimizer: false",
    }.get(demand.resource, "lower resources.shm, or raise resources.memory_per_node")
    return f"{demand.resource}: at least {needed} for each {demand.per}, but there are {have}; {how}"
