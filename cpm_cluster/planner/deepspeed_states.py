"""What DeepSpeed keeps on one GPU, by stage, version and where it offloads to. Symbols as in states.py."""

from __future__ import annotations

import re
from functools import lru_cache

from cpm_cluster.planner.fit import Component
from cpm_cluster.planner.setup import Setup
from cpm_cluster.planner.stages import Stage
from cpm_cluster.planner.states import (
    ZERO,
    States,
    moment_bytes,
    over,
    part,
    sharded_weights,
    trained_in_stage,
    weight_bytes,
)

DEEPSPEED_ENGINE = "deepspeed/runtime/engine.py, _configure_distributed_model"
STAGE_0 = "deepspeed/runtime/fp16/fused_optimizer.py, step"
STAGE_2 = "deepspeed/runtime/zero/stage_1_and_2.py"
STAGE_3 = "deepspeed/runtime/zero/stage3.py"
# Defaults of deepspeed/runtime/zero/config.py, elements.
DEEPSPEED_BUCKET = 500_000_000  # reduce_bucket_size
MAX_LIVE = 1_000_000_000  # stage3_max_live_parameters
SUB_GROUP = 1_000_000_000  # sub_group_size: stage 3 steps in groups of so many
HALF_MASTER_WEIGHTS = (0, 18, 3)  # bf16_master_weights_and_grads: DeepSpeed#7700 of November 2025
BUCKETS_IN_STAGE_1 = (0, 12, 7)  # until then engine.py left contiguous_gradients to stage 2


def deepspeed_states(setup: Setup, stage: Stage) -> States:
    """Half-precision weights; fp32 master copy, moments and step over n. Stage 3 shards the weights as well."""
    n, level = setup.shards, setup.zero_stage
    width, trained = weight_bytes(setup), trained_in_stage(setup, stage)
    weights_over, states_over = (n if level >= 3 else 1), (n if level >= 1 else 1)
    on_host = setup.offload_optimizer and level >= 1
    at_rest: list[Component] = []
    if not (setup.offload_param and level >= 3):
        at_rest += sharded_weights(setup, stage, width, weights_over)
    master = master_bytes(setup)
    if not on_host:
        states = (0 if width == 4 else master) + moment_bytes(setup, master)
        name = "Adam moments" if width == 4 else "master copy and moments"
        at_rest.append(part(name, f"{states}T" + over(states_over), states * trained / states_over, ZERO))
    if level == 2 or (level == 1 and (deepspeed_version(setup) or BUCKETS_IN_STAGE_1) >= BUCKETS_IN_STAGE_1):
        at_rest.append(_bucket(setup, width, trained))
    gradients = []
    if level <= 1 or not on_host:
        gradients_over = n if level >= 2 else 1
        gradients.append(part("gradients", f"{width}T" + over(gradients_over), width * trained / gradients_over, ZERO))
    flat = []
    if not on_host and width == 2 and not setup.trains_adapters:
        group = min(trained / states_over, SUB_GROUP) if level >= 3 else trained / states_over
        source = STAGE_3 if level >= 3 else STAGE_2
        what = "fp32 gradients" if master == 4 else "flat gradients"
        flat.append(part(what, f"{master}T" + over(states_over), master * group, source))
    if on_host and width == 2 and master == 4 and 1 <= level <= 2 and returns_wide_weights(setup):
        flat.append(part("updated weights in fp32", "4T" + over(n), 4 * trained / n, STAGE_2 + " of 0.14.1 to 0.16"))
    stepping = []
    if level == 0 and setup.precision == "fp16":
        stepping.append(part("fp32 gradients before they are flat", "4T", 4 * trained, STAGE_0))
    computing = _gathered(setup, width, n) if level >= 3 else []
    reducing = [_largest_gradient(setup, width)] if level == 2 and not setup.trains_adapters else []
    staging = []
    if level >= 3 and not setup.zero_init:
        staging.append(part("the whole model", f"{width}N", width * stage.parameters, DEEPSPEED_ENGINE))
    return States(
        tuple(at_rest),
        tuple(gradients),
        tuple(computing),
        tuple(reducing),
        tuple(stepping),
        tuple(flat),
        tuple(staging),
    )


def step_beyond(setup: Setup, stage: Stage) -> int:
    """Bytes that DeepSpeed's step may take on top.

    Stages 1 and 2 lay the gradients of a part flat before they make them fp32 (stage_1_and_2.py, step). A configuration
    without an optimizer leaves AdamW to torch, which takes the square roots of a whole part at once
    (torch/optim/adamw.py; LLaMA-Factory#1221 died of it).
    """
    if setup.engine != "deepspeed" or setup.offload_optimizer:
        return 0
    trained = trained_in_stage(setup, stage) / (setup.shards if setup.zero_stage else 1)
    wide = master_bytes(setup) == 4
    size = 2.0 * trained if setup.zero_stage in (1, 2) and weight_bytes(setup) == 2 and wide else 0.0
    if "transformers" in setup.engine_version and setup.optimizer in ("adam", "adamw"):
        size += master_bytes(setup) * min(trained, SUB_GROUP if setup.zero_stage >= 3 else trained)
    return round(size)


def master_bytes(setup: Setup) -> int:
    """Of DeepSpeed's master copy of a parameter, and of each of its moments.

    Pure half precision is bf16_master_weights_and_grads and bf16_optimizer_states, which stages 1 to 3 alone know, and
    not with offloading (DeepSpeed#7700): the master copy is a clone (stage3.py, stage_1_and_2.py).
    """
    version = deepspeed_version(setup)
    known = not version or version >= HALF_MASTER_WEIGHTS
    pure = setup.precision.endswith("_pure") and setup.mode == "full" and setup.zero_stage >= 1
    return 2 if pure and known and not setup.offload_optimizer else 4


def states_beyond(setup: Setup, stage: Stage) -> int:
    """Bytes of fp32 states where DeepSpeed's version is not known to have half ones: programs that call themselves
    pure may but load their weights so (LLaMA-Factory's pure_bf16)."""
    if setup.engine != "deepspeed" or master_bytes(setup) == 4 or deepspeed_version(setup):
        return 0
    wider = 2 + moment_bytes(setup, 4) - moment_bytes(setup, 2)
    return round(wider * trained_in_stage(setup, stage) / setup.shards)


def deepspeed_version(setup: Setup) -> tuple[int, ...]:
    """(0, 14, 1); empty where nothing says."""
    return _deepspeed_version(setup.engine_version)


@lru_cache
def _deepspeed_version(software: str) -> tuple[int, ...]:
    stated = re.search(r"(?:^|[Dd]eep[Ss]peed )(\d+)\.(\d+)(?:\.(\d+))?", software)
    return tuple(int(number or 0) for number in stated.groups()) if stated else ()


def returns_wide_weights(setup: Setup) -> bool:
    """Whether stages 1 and 2 bring offloaded master weights to the GPU before they are cast.

    `fp32_partition.to(device)` in stage_1_and_2.py, step, from 0.14.1 on; a half-precision buffer of the host does it
    since 0.17.0. Of an unknown version it is assumed.
    """
    version = deepspeed_version(setup)
    return not version or (0, 14, 1) <= version < (0, 17, 0)


def largest_matrix(setup: Setup) -> int:
    shape = setup.shape
    return max(shape.embedding_parameters, *(rows * columns for rows, columns in shape.linear_shapes.values()))


def _largest_gradient(setup: Setup, width: int) -> Component:
    """A tensor's gradient waits whole for its reduction, and is made fp32 on its way to the host."""
    each = width + (4 if setup.offload_optimizer and width == 2 else 0)
    size = each * largest_matrix(setup)
    return part("gradient of the largest matrix", f"{each} × largest", size, STAGE_2)


def _bucket(setup: Setup, width: int, trained: float) -> Component:
    """One buffer, two where reduction overlaps the backward pass; a larger tensor is reduced by itself."""
    buffers = 2 if setup.overlap_comm else 1
    elements = setup.bucket_elements or DEEPSPEED_BUCKET
    if trained < elements and setup.trains_adapters:
        buffers, elements = 1, round(trained)  # reduced at once
    size = buffers * width * elements
    return part("reduce bucket", f"{buffers * width} × bucket", size, STAGE_2)


def _gathered(setup: Setup, width: int, n: int) -> list[Component]:
    """Stage 3: weights that are gathered at once, and the largest matrix with its gradient."""
    shape = setup.shape
    largest = largest_matrix(setup)
    reduced = 0.0
    if setup.mode == "full":  # the gradient, flattened for the reduce-scatter, and its part in half and fp32
        reduced = (width + 2 * width / n) * largest
    if shape.tied_embeddings and setup.mode == "full":
        reduced += width * shape.embedding_parameters  # the head's gradient waits for the embedding's
    return [
        live_weights(setup, width),
        part(
            "largest matrix",
            f"{3 * width} + {2 * width}/n",
            2 * width * largest + reduced,
            STAGE_3,
        ),
    ]


def live_weights(setup: Setup, width: float) -> Component:
    shape = setup.shape
    live = min(
        shape.parameters / setup.tp, max(setup.max_live_params or MAX_LIVE, shape.parameters_per_layer / setup.tp)
    )
    return part("gathered weights", f"{width:g} × live", width * live, "deepspeed/runtime/zero/config.py")
