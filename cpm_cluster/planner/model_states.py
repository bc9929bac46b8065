"""Weights, gradients and optimizer states on one GPU, at rest, while computing and in the optimizer step.

Symbols: N parameters (N' of a pipeline stage and tensor rank), T trained parameters, n data-parallel ranks that share a
state, V vocabulary, h hidden. Sources are files of the engine's repository, or papers.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

from cpm_cluster.planner.fit import Component
from cpm_cluster.planner.setup import Setup
from cpm_cluster.planner.stages import Stage

ZERO = "ZeRO, Rajbhandari et al. 2020"
DTYPE = "bytes of the data type"
ADAM = "Adam, Kingma and Ba 2015"
DEEPSPEED_ENGINE = "deepspeed/runtime/engine.py, _configure_distributed_model"
STAGE_0 = "deepspeed/runtime/fp16/fused_optimizer.py, step"
STAGE_2 = "deepspeed/runtime/zero/stage_1_and_2.py"
STAGE_3 = "deepspeed/runtime/zero/stage3.py"
BLOCKS = "bmtrain/block_layer.py"
BLOCK_CONTEXT = "bmtrain/zero_context.py"
FSDP_REDUCES = "torch/distributed/fsdp/_runtime_utils.py"
BLOCKS_GATHERED = "torch/distributed/fsdp, root and prefetch; bmtrain/zero_context.py"
FSDP_STAGE_2 = "torch/distributed/fsdp/api.py, SHARD_GRAD_OP"
# Between the micro batches of a step transformers' trainer and accelerate reduce nothing (sync_each_batch=False).
NO_SYNC = "accelerate, concept_guides/gradient_synchronization: no_sync"
# Defaults of deepspeed/runtime/zero/config.py, elements.
DEEPSPEED_BUCKET = 500_000_000  # reduce_bucket_size
MAX_LIVE = 1_000_000_000  # stage3_max_live_parameters
SUB_GROUP = 1_000_000_000  # sub_group_size: stage 3 steps in groups of so many
# Moments of an optimizer, by its name without paged_ and _8bit.
MOMENTS = {"sgd": 0, "sgd_momentum": 1, "lion": 1, "adafactor": 0}
OPTIMIZERS = "Shazeer and Stern 2018 (Adafactor), Chen et al. 2023 (Lion)"
# Bytes of a frozen weight. NF4: 4 bits and an fp32 scale for each 64; double quantisation: 0.127 bits for scales
# (QLoRA, Dettmers et al. 2023). GPTQ and int4: groups of 128 with an fp16 scale and a 4-bit zero;
# int8: the scale alone (assumed).
QUANTISED_BYTES = {
    "nf4": 0.5 + 4 / 64,
    "nf4_dq": 0.5 + 0.127 / 8,
    "int4": 0.5 + 2.5 / 128,
    "int4_gptq": 0.5 + 2.5 / 128,
    "int8": 1.0 + 2 / 128,
    "int8_gptq": 1.0 + 3 / 128,
}
HALF_MASTER_WEIGHTS = (0, 18, 3)  # bf16_master_weights_and_grads: DeepSpeed#7700 of November 2025
BUCKETS_IN_STAGE_1 = (0, 12, 7)  # until then engine.py left contiguous_gradients to stage 2


@dataclass(frozen=True)
class States:
    """Components by when they are there."""

    at_rest: tuple[Component, ...]  # always
    gradients: tuple[Component, ...] = ()  # from the backward pass to the step
    computing: tuple[Component, ...] = ()  # in the forward and backward pass
    reducing: tuple[Component, ...] = ()  # in the backward pass
    stepping: tuple[Component, ...] = ()  # in the optimizer step
    flat_in_step: tuple[Component, ...] = ()  # in the step; too large for what the allocator's cache has free
    staging: tuple[Component, ...] = ()  # while the engine is built, before anything else
    in_head: tuple[Component, ...] = ()  # at the end of the forward pass, where the head begins its backward pass


def model_states(setup: Setup, stage: Stage) -> States:
    if setup.mode == "infer":
        return _served(setup, stage)
    return ENGINES[setup.engine](setup, stage)


def _served(setup: Setup, stage: Stage) -> States:
    """Weights to read alone: whole, or sharded over n and gathered as they are used (ZeRO-Inference, FSDP, BMTrain)."""
    sharded = setup.zero_stage >= 3 and (setup.shards > 1 or setup.offload_param)
    if not sharded or setup.engine not in ("deepspeed", "fsdp", "bmtrain"):
        return States(tuple(_frozen(setup, stage)))
    on_host = setup.offload_param and setup.engine != "bmtrain"
    at_rest = () if on_host else tuple(_frozen(setup, stage, setup.shards))
    shape, width = setup.shape, weight_bytes(setup)
    stored = QUANTISED_BYTES.get(setup.precision, width)
    if setup.engine == "deepspeed":
        return States(at_rest, computing=(_live(setup, stored),))
    blocks = part("gathered blocks", "2 × block", 2 * stored * shape.parameters_per_layer / setup.tp, BLOCKS_GATHERED)
    vocabulary = width * shape.vocabulary_matrices * shape.embedding_parameters / setup.tp
    embeddings = part("gathered embeddings", f"{width}Vh for each", vocabulary, BLOCKS_GATHERED)
    return States(at_rest, computing=(blocks, embeddings))


def _live(setup: Setup, width: float) -> Component:
    shape = setup.shape
    live = min(
        shape.parameters / setup.tp, max(setup.max_live_params or MAX_LIVE, shape.parameters_per_layer / setup.tp)
    )
    return part("gathered weights", f"{width:g} × live", width * live, "deepspeed/runtime/zero/config.py")


def part(name: str, formula: str, size: float, source: str) -> Component:
    return Component(name, max(0, round(size)), formula, source)


def weight_bytes(setup: Setup) -> int:
    """Of an element in forward and backward."""
    return 4 if setup.precision == "fp32" else 2


def over(ranks: int) -> str:
    return f"/{ranks}" if ranks > 1 else ""


def _frozen(setup: Setup, stage: Stage, ranks: int = 1) -> list[Component]:
    """Weights that nothing trains, in their own format."""
    if not setup.quantised:
        whole = weight_bytes(setup)
        name = "weights" if setup.mode == "infer" else "frozen weights"
        return [part(name, f"{whole}N" + over(ranks), whole * stage.parameters / ranks, DTYPE)]
    width, wide = QUANTISED_BYTES[setup.precision], 4 if widens_embeddings(setup) else 2
    linear = _quantised_parameters(setup, stage)
    rest = stage.parameters - linear
    return [
        part(f"{setup.precision} weights", f"{width:.3f} linear" + over(ranks), width * linear / ranks, "QLoRA"),
        part("embeddings and norms", f"{wide} × the rest" + over(ranks), wide * rest / ranks, DTYPE),
    ]


def _quantised_parameters(setup: Setup, stage: Stage) -> float:
    """All on a stage but embeddings and norms, and the head where that isn't quantised."""
    shape = setup.shape
    outside = shape.vocabulary_matrices * shape.embedding_parameters
    blocks = shape.parameters - outside - (2 * shape.layers + 1) * shape.hidden
    head = shape.embedding_parameters if quantises_the_head(setup) else 0
    if setup.pp == 1:
        return (blocks + head) * stage.parameters / shape.parameters
    return blocks * stage.blocks / shape.layers / setup.tp + head


def widens_embeddings(setup: Setup) -> bool:
    """peft's prepare_model_for_kbit_training casts what stays unquantised to fp32 (not with GPTQ: assumed there).

    Not where weights are sharded, which must be of one type (trl/trainer/sft_trainer.py, is_sharded_qlora); axolotl
    casts them back to half (axolotl/loaders/model.py, needs_fa2_dtype).
    """
    sharded = setup.engine == "fsdp" or setup.zero_stage >= 3
    keeps_half = setup.engine_version.startswith(("litgpt", "axolotl"))
    return setup.quantised and setup.mode != "infer" and not sharded and not keeps_half


def quantises_the_head(setup: Setup) -> bool:
    """litgpt quantises every linear layer, the others leave the head alone."""
    return setup.engine_version.startswith("litgpt") and not setup.shape.tied_embeddings


def _trained(setup: Setup, stage: Stage) -> float:
    if not setup.trains_adapters:
        return setup.trained_parameters * stage.parameters / setup.shape.parameters
    whole = _trained_vocabulary(setup, stage)
    in_blocks = max(0, setup.trained_parameters - setup.fully_trained_vocabulary)
    return in_blocks * stage.blocks / setup.shape.layers / setup.tp + whole


def _trained_vocabulary(setup: Setup, stage: Stage) -> float:
    """Trained whole beside adapters; a stage of a pipeline has one matrix at most."""
    whole = min(setup.fully_trained_vocabulary, setup.trained_parameters)
    if setup.pp > 1:
        whole = min(whole, setup.shape.embedding_parameters)
    return whole * stage.vocabulary_share


def moment_bytes(setup: Setup, width: int) -> int:
    """Of one trained parameter: the optimizer's moments, each in the format of the weights that it steps.

    8-bit ones are a byte each (Dettmers et al. 2022), paged ones the same wherever they are. Adafactor keeps sums of
    rows and columns alone (Shazeer and Stern 2018). An optimizer of another name is taken for Adam.
    """
    name = setup.optimizer.removeprefix("paged_")
    count = MOMENTS.get(name.removesuffix("_8bit"), 2)
    return count * (1 if name.endswith("_8bit") else width)


def _moments(setup: Setup, width: int, trained: float, ranks: int = 1) -> Component:
    each, name = moment_bytes(setup, width), moments_name(setup)
    source = ADAM if name.startswith("Adam") else OPTIMIZERS
    return part(name, f"{each}T" + over(ranks), each * trained / ranks, source)


def moments_name(setup: Setup) -> str:
    return "Adam moments" if "adam" in setup.optimizer else f"{setup.optimizer} moments"


def _foreach(setup: Setup, width: int, trained: float) -> tuple[Component, ...]:
    """Since torch 2.0 AdamW steps all tensors at once: square roots and denominators of all; in place from 2.1 on."""
    copies = {(2, 0): 2, (1, 13): 0, (1, 11): 0}.get(setup.torch_version, 1)
    if copies == 0 or setup.optimizer not in ("adam", "adamw"):
        return ()
    return (part("AdamW temporaries", f"{copies * width}T", copies * width * trained, "torch/optim, foreach AdamW"),)


def _one_process(setup: Setup, stage: Stage) -> States:
    """No sharding."""
    trained = _trained(setup, stage)
    adapters = setup.trains_adapters
    pure = setup.precision.endswith("_pure") or "litgpt" in setup.engine_version
    at_rest: list[Component] = []
    if adapters:
        at_rest += _frozen(setup, stage)
    elif setup.mode == "reward":
        at_rest.append(part("frozen weights", "4(N - T)", 4 * (stage.parameters - trained), DTYPE))
    whole = _trained_vocabulary(setup, stage) if adapters else 0.0  # copied as loaded (peft's modules_to_save)
    rest = trained - whole
    width = 2 if pure else 4
    parts = [(rest, width, "")] + ([(whole, 2, " of the vocabulary")] if whole else [])
    gradients: list[Component] = []
    stepping: list[Component] = []
    for count, w, what in parts:
        moments = _moments(setup, w, count)
        at_rest.append(part("trained weights" + what, f"{w}T", w * count, DTYPE))
        at_rest.append(replace(moments, name=moments.name + what))
        gradients.append(part("gradients" + what, f"{w}T", w * count, DTYPE))
        stepping += _foreach(setup, w, count)
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


def _deepspeed(setup: Setup, stage: Stage) -> States:
    """Half-precision weights; fp32 master copy, moments and step over n. Stage 3 shards the weights as well."""
    n, level = setup.shards, setup.zero_stage
    width, trained = weight_bytes(setup), _trained(setup, stage)
    weights_over, states_over = (n if level >= 3 else 1), (n if level >= 1 else 1)
    on_host = setup.offload_optimizer and level >= 1
    at_rest: list[Component] = []
    if not (setup.offload_param and level >= 3):
        if setup.trains_adapters:
            at_rest += _frozen(setup, stage, weights_over)
        elif setup.mode == "reward":
            frozen = width * (stage.parameters - trained) / weights_over
            at_rest.append(part("frozen weights", f"{width}(N - T)" + over(weights_over), frozen, DTYPE))
        at_rest.append(part("trained weights", f"{width}T" + over(weights_over), width * trained / weights_over, ZERO))
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
    trained = _trained(setup, stage) / (setup.shards if setup.zero_stage else 1)
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
    return round(wider * _trained(setup, stage) / setup.shards)


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
        _live(setup, width),
        part(
            "largest matrix",
            f"{3 * width} + {2 * width}/n",
            2 * width * largest + reduced,
            STAGE_3,
        ),
    ]


def _fsdp(setup: Setup, stage: Stage) -> States:
    """Shards in the precision of the checkpoint (fp32, or half where that is pure); half-precision units in flight.

    Stage 2 keeps units gathered from the forward to the backward pass. Weights on the host take their gradients along.
    """
    shape, n = setup.shape, setup.shards if setup.zero_stage else 1
    width = 2 if setup.precision.endswith("_pure") or setup.trains_adapters else 4
    used = weight_bytes(setup)
    trained = _trained(setup, stage)
    weights_over = n if setup.zero_stage >= 2 else 1
    at_rest: list[Component] = []
    if not setup.offload_param:
        if setup.trains_adapters:
            at_rest += _frozen(setup, stage, weights_over)
        elif setup.mode == "reward":
            frozen = width * (stage.parameters - trained) / weights_over
            at_rest.append(part("frozen weights", f"{width}(N - T)" + over(weights_over), frozen, DTYPE))
        at_rest.append(part("trained weights", f"{width}T" + over(weights_over), width * trained / weights_over, ZERO))
    if not setup.zero_init:
        whole = 2 * stage.parameters
        at_rest.append(part("the unsharded weights", "2N", whole, "assumed: read before sharding, and kept"))
    if not setup.offload_optimizer:
        at_rest.append(_moments(setup, width, trained, n))
    gradients = []
    if not setup.offload_param:
        gradients.append(part("gradients", f"{width}T" + over(n), width * trained / n, ZERO))
    if setup.accumulates and not written_for_fsdp(setup):
        gradients.append(part("gradients not yet reduced", "2T", 2 * trained, NO_SYNC))
    block = shape.parameters_per_layer / setup.tp
    held = QUANTISED_BYTES.get(setup.precision, used)
    if setup.zero_stage == 2:
        kept = held * stage.parameters
        computing = [part("weights kept to the backward pass", f"{held:g}N", kept, FSDP_STAGE_2)]
    else:
        computing = [part("gathered blocks", "2 × block", 2 * held * block, "torch/distributed/fsdp, BACKWARD_PRE")]
        if setup.zero_init:  # else they are counted with the unsharded weights
            root = used * shape.vocabulary_matrices * shape.embedding_parameters / setup.tp
            computing.append(part("gathered embeddings", f"{used}Vh for each", root, "torch/distributed/fsdp, root"))
    if not setup.trains_adapters:
        computing.append(part("gradients of a block", f"{used} × block", used * block, FSDP_REDUCES))
    return States(tuple(at_rest), tuple(gradients), tuple(computing), stepping=_foreach(setup, width, trained / n))


def written_for_fsdp(setup: Setup) -> bool:
    """Programs with models and loops of their own, not those of transformers in FSDP."""
    return setup.engine == "fsdp" and not re.search(r"transformers|trl|accelerate", setup.engine_version)


def records_streams(setup: Setup) -> bool:
    """The first FSDP, whose memory one stream frees and another may not have yet; the second one waits instead.

    torch/distributed/fsdp/_runtime_utils.py, record_stream; pytorch#114299 of fully_shard.
    """
    second = "torchtitan" in setup.engine_version or setup.torch_version >= (2, 6)
    return setup.engine == "fsdp" and not second


def _megatron(setup: Setup, stage: Stage) -> States:
    """Half-precision weights of the stage; states over n with the distributed optimizer or ZeRO-1."""
    local, n = stage.parameters, setup.shards if setup.zero_stage else 1
    if setup.trains_adapters:
        adapters = part("adapters", "18T'", 18 * _trained(setup, stage), ZERO)
        return States((*_frozen(setup, stage), adapters))
    weights = part("weights", "2N'", 2 * local, DTYPE)
    states = part("master copy and moments", "12N'" + over(n), 12 * local / n, ZERO)
    if "DeepSpeed" not in setup.engine_version:
        return States((weights, states, part("gradients", "4N'", 4 * local, "Megatron-LM, docs/…/dist_optimizer.md")))
    if setup.precision == "bf16_fp32grad":
        return States(
            (weights, states, part("gradients in fp32", "4N'", 4 * local, "deepspeed/runtime/bf16_optimizer.py")),
            (part("gradients and their flat copy", "4N'", 4 * local, "bf16_optimizer.py: 2N'; the copy is assumed"),),
        )
    at_rest = [weights, states]
    if setup.pp == 1:
        bucket = min(local, DEEPSPEED_BUCKET)
        at_rest.append(
            part("reduce and gather buckets", "4 × bucket", 4 * bucket, "assumed: one to reduce, one to gather")
        )
    flat = (
        part("fp32 gradients", "4N'" + over(n), 4 * local / n, STAGE_2),
        part("gathered parts", "4N'" + over(n), 4 * local / n, FITTED_PARTS),
    )
    return States(tuple(at_rest), (part("gradients", "2N'", 2 * local, DTYPE),), flat_in_step=flat)


FITTED_PARTS = "fitted: half gradients and weights of the part, as they are reduced and gathered"


def _bmtrain(setup: Setup, stage: Stage) -> States:
    """All sharded at rest in both stages; blocks are gathered one after another, the head's matrix on its own.

    Gradients are there from the second step on: zero_grad keeps them (optim_manager.py), and those of a block belong to
    its storage, also where its weights were frozen once it was made, as OpenDelta does it. Before 1.0 the code of
    zero_context.py is in block_layer.py.
    """
    n, shape = setup.shards, setup.shape
    width, trained, whole = weight_bytes(setup), _trained(setup, stage), stage.parameters
    frozen_vocabulary = setup.trains_adapters and not setup.fully_trained_vocabulary
    at_rest = [part("weights", f"{width}N" + over(n), width * whole / n, BLOCKS)]
    outside = shape.vocabulary_matrices * shape.embedding_parameters if frozen_vocabulary else 0
    stored, what = (whole - outside, "(N - vocabulary)") if outside else (whole, "N")
    if setup.trains_adapters and setup.frozen_first:
        stored, what = trained, "T"
    at_rest.append(part("gradients", f"{width}{what}" + over(n), width * stored / n, BLOCK_CONTEXT))
    if not setup.offload_optimizer:
        moments = 6 if setup.precision.startswith("fp16") else 8  # fp16: the first moment in half
        states = moments + (4 if width == 2 else 0)
        at_rest.append(
            part("master copy and moments", f"{states}T" + over(n), states * trained / n, "bmtrain/optim/adam.py")
        )
    each = width if frozen_vocabulary else 2 * width
    head = part(
        "the head, gathered" if frozen_vocabulary else "the head, gathered, and its gradient",
        f"{each}Vh",
        each * shape.embedding_parameters,
        "bmtrain/parameter.py, OpAllGather",
    )
    computing, reducing = _bmtrain_blocks(setup, width)
    return States(tuple(at_rest), in_head=(head,), computing=computing, reducing=reducing)


def _bmtrain_blocks(setup: Setup, width: int) -> tuple[tuple[Component, ...], tuple[Component, ...]]:
    """(in both passes, in the backward pass on top).

    The next block is gathered while the GPU still computes the one before; in the backward pass it is entered, with its
    gradients, before the one before is released (release_next_module; before 1.0 exit_prev). Stage 2 keeps gathered
    weights to the backward pass.
    """
    block = width * setup.shape.parameters_per_layer
    held, what = float(block), "block"
    if setup.trains_adapters and setup.frozen_first:
        held, what = width * setup.trained_parameters / setup.shape.layers, "T of a block"
    gradients = part("gradients of two blocks", f"2 × {width} × {what}", 2 * held, BLOCK_CONTEXT)
    if setup.zero_stage == 2:
        kept = setup.shape.layers * block
        return (part("weights kept to the backward pass", f"{width} × blocks", kept, BLOCK_CONTEXT),), (gradients,)
    return (part("two gathered blocks", f"2 × {width} × block", 2 * block, BLOCK_CONTEXT),), (gradients,)


ENGINES: dict[str, Callable[[Setup, Stage], States]] = {
    "none": _one_process,
    "ddp": _ddp,
    "deepspeed": _deepspeed,
    "fsdp": _fsdp,
    "megatron": _megatron,
    "bmtrain": _bmtrain,
}
