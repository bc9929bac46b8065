"""What every engine keeps of a model alike: trained and frozen parameters, moments, and when each is there.

Symbols: N parameters (N' of a pipeline stage and tensor rank), T trained parameters, n data-parallel ranks that share a
state, V vocabulary, h hidden. Sources are files of the engine's repository, or papers.
"""

from __future__ import annotations

from dataclasses import dataclass

from cpm_cluster.planner.fit import Component
from cpm_cluster.planner.setup import Setup
from cpm_cluster.planner.stages import Stage

ZERO = "ZeRO, Rajbhandari et al. 2020"
DTYPE = "bytes of the data type"
ADAM = "Adam, Kingma and Ba 2015"
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


def part(name: str, formula: str, size: float, source: str) -> Component:
    return Component(name, max(0, round(size)), formula, source)


def weight_bytes(setup: Setup) -> int:
    """Of an element in forward and backward."""
    return 4 if setup.precision == "fp32" else 2


def over(ranks: int) -> str:
    return f"/{ranks}" if ranks > 1 else ""


def frozen_weights(setup: Setup, stage: Stage, ranks: int = 1) -> list[Component]:
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


def sharded_weights(setup: Setup, stage: Stage, width: int, ranks: int) -> list[Component]:
    """Frozen and trained weights of a ZeRO engine, whose trained ones have `width` bytes, over so many ranks."""
    trained, share = trained_in_stage(setup, stage), over(ranks)
    held: list[Component] = []
    if setup.trains_adapters:
        held += frozen_weights(setup, stage, ranks)
    elif setup.mode == "reward":
        frozen = width * (stage.parameters - trained) / ranks
        held.append(part("frozen weights", f"{width}(N - T)" + share, frozen, DTYPE))
    return [*held, part("trained weights", f"{width}T" + share, width * trained / ranks, ZERO)]


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


def trained_in_stage(setup: Setup, stage: Stage) -> float:
    if not setup.trains_adapters:
        return setup.trained_parameters * stage.parameters / setup.shape.parameters
    whole = trained_vocabulary(setup, stage)
    in_blocks = max(0, setup.trained_parameters - setup.fully_trained_vocabulary)
    return in_blocks * stage.blocks / setup.shape.layers / setup.tp + whole


def trained_vocabulary(setup: Setup, stage: Stage) -> float:
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


def moments(setup: Setup, width: int, trained: float, ranks: int = 1) -> Component:
    each, name = moment_bytes(setup, width), moments_name(setup)
    source = ADAM if name.startswith("Adam") else OPTIMIZERS
    return part(name, f"{each}T" + over(ranks), each * trained / ranks, source)


def moments_name(setup: Setup) -> str:
    return "Adam moments" if "adam" in setup.optimizer else f"{setup.optimizer} moments"


def foreach_temporaries(setup: Setup, width: int, trained: float) -> tuple[Component, ...]:
    """Since torch 2.0 AdamW steps all tensors at once: square roots and denominators of all; in place from 2.1 on."""
    copies = {(2, 0): 2, (1, 13): 0, (1, 11): 0}.get(setup.torch_version, 1)
    if copies == 0 or setup.optimizer not in ("adam", "adamw"):
        return ()
    return (part("AdamW temporaries", f"{copies * width}T", copies * width * trained, "torch/optim, foreach AdamW"),)
