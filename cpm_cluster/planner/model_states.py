"""Weights, gradients and optimizer states on one GPU, at rest, while computing and in the optimizer step.

Of one process and of DDP here, of other engines in their own modules. Symbols as in states.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from cpm_cluster.planner.bmtrain_states import bmtrain_states
from cpm_cluster.planner.deepspeed_states import deepspeed_states, live_weights
from cpm_cluster.planner.fit import Component
from cpm_cluster.planner.fsdp_states import fsdp_states
from cpm_cluster.planner.megatron_states import megatron_states
from cpm_cluster.planner.setup import Setup
from cpm_cluster.planner.stages import Stage
from cpm_cluster.planner.states import (
    DTYPE,
    QUANTISED_BYTES,
    States,
    foreach_temporaries,
    frozen_weights,
    moments,
    part,
    trained_in_stage,
    trained_vocabulary,
    weight_bytes,
)

BLOCKS_GATHERED = "torch/distributed/fsdp, root and prefetch; bmtrain/zero_context.py"


def model_states(setup: Setup, stage: Stage) -> States:
    if setup.mode == "infer":
        return _served(setup, stage)
    return ENGINES[setup.engine](setup, stage)


def _served(setup: Setup, stage: Stage) -> States:
    """Weights to read alone: whole, or sharded over n and gathered as they are used (ZeRO-Inference, FSDP, BMTrain)."""
    sharded = setup.zero_stage >= 3 and (setup.shards > 1 or setup.offload_param)
    if not sharded or setup.engine not in ("deepspeed", "fsdp", "bmtrain"):
        return States(tuple(frozen_weights(setup, stage)))
    on_host = setup.offload_param and setup.engine != "bmtrain"
    at_rest = () if on_host else tuple(frozen_weights(setup, stage, setup.shards))
    shape, width = setup.shape, weight_bytes(setup)
    stored = QUANTISED_BYTES.get(setup.precision, width)
    if setup.engine == "deepspeed":
        return States(at_rest, computing=(live_weights(setup, stored),))
    blocks = part("gathered blocks", "2 × block", 2 * stored * shape.parameters_per_layer / setup.tp, BLOCKS_GATHERED)
    vocabulary = width * shape.vocabulary_matrices * shape.embedding_parameters / setup.tp
    embeddings = part("gathered embeddings", f"{width}Vh for each", vocabulary, BLOCKS_GATHERED)
    return States(at_rest, computing=(blocks, embeddings))


def _one_process(setup: Setup, stage: Stage) -> States:
    """No sharding."""
    trained = trained_in_stage(setup, stage)
    adapters = setup.trains_adapters
    pure = setup.precision.endswith("_pure") or "litgpt" in setup.engine_version
    at_rest: list[Component] = []
    if adapters:
        at_rest += frozen_weights(setup, stage)
    elif setup.mode == "reward":
        at_rest.append(part("frozen weights", "4(N - T)", 4 * (stage.parameters - trained), DTYPE))
    whole = trained_vocabulary(setup, stage) if adapters else 0.0  # copied as loaded (peft's modules_to_save)
    rest = trained - whole
    width = 2 if pure else 4
    parts = [(rest, width, "")] + ([(whole, 2, " of the vocabulary")] if whole else [])
    gradients: list[Component] = []
    stepping: list[Component] = []
    for count, w, what in parts:
        kept = moments(setup, w, count)
        at_rest.append(part("trained weights" + what, f"{w}T", w * count, DTYPE))
        at_rest.append(replace(kept, name=kept.name + what))
        gradients.append(part("gradients" + what, f"{w}T", w * count, DTYPE))
        stepping += foreach_temporaries(setup, w, count)
    casts: tuple[Component, ...] = ()
    if not pure and not adapters and setup.precision in ("fp16", "bf16"):
        casts = (part("half copies of the weights", "2T", 2 * trained, "torch autocast's cache, of what is trained"),)
    return States(tuple(at_rest), tuple(gradients), casts, stepping=tuple(stepping))


def _ddp(setup: Setup, stage: Stage) -> States:
    """As one process; buckets are a second copy of the gradients (gradient_as_bucket_view=False)."""
    alone = _one_process(setup, stage)
    size = sum(component.bytes for component in alone.gradients)
    buckets = part("buckets", "gradients once more", size, "torch/nn/parallel/distributed.py")
    return States((*alone.at_rest, buckets), alone.gradients, alone.computing, stepping=alone.stepping)


ENGINES: dict[str, Callable[[Setup, Stage], States]] = {
    "none": _one_process,
    "ddp": _ddp,
    "deepspeed": deepspeed_states,
    "fsdp": fsdp_states,
    "megatron": megatron_states,
    "bmtrain": bmtrain_states,
}
