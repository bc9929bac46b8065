"""Floating-point operations of a transformer, per token.

A multiplication and an addition count as two operations; a linear layer with P parameters costs 2P forward, and as much
again for each of the two gradients (Kaplan et al. 2020, section 2.1). Attention over s tokens costs 4 s w forward for
each layer of attention width w: scores and weighted values, not halved for a causal mask, as is usual for MFU
(Chowdhery et al. 2022, appendix B).
"""

from __future__ import annotations

from dataclasses import dataclass

from cpm_cluster.planner.setup import Setup, Shape

# A recompute of every second matrix product, as torchtitan's and fms-fsdp's selective activation checkpointing.
SELECTIVE_LINEAR = 0.5


@dataclass(frozen=True)
class Passes:
    """How often the forward work of each part is done in a micro step (forward 1, each gradient 1, recompute 1)."""

    linear: float
    attention: float  # a full backward pass of attention costs two forward ones
    head: float
    model_linear: float  # without what is done again, for MFU
    model_attention: float


def passes(setup: Setup) -> Passes:
    """Forward work in units of one forward pass."""
    if setup.mode == "infer":
        return Passes(1, 1, 1, 1, 1)
    weight_gradients = _share_of_weight_gradients(setup)
    linear = 2 + weight_gradients
    attention = 3.0
    if setup.mode == "reward":  # frozen lower layers need no backward pass at all
        linear, attention = 1 + 2 * weight_gradients, 1 + 2 * weight_gradients
    again_linear = again_attention = 0.0
    if recomputes_all(setup):
        again_linear = again_attention = 1.0
    elif setup.recompute == "selective" and setup.engine == "megatron":  # Korthikanti et al. 2022: attention alone
        again_attention = 1.0
    elif setup.recompute == "selective":
        again_linear = SELECTIVE_LINEAR
    head = 2.0 + (0 if setup.trains_adapters else 1)  # its logits are not recomputed
    return Passes(linear + again_linear, attention + again_attention, head, linear, attention)


def recomputes_all(setup: Setup) -> bool:
    """BMTrain before 1.0 has no blocks but CheckpointBlock, which always recomputes (bmtrain/block_layer.py)."""
    return setup.recompute == "full" or (setup.engine == "bmtrain" and not setup.engine_version.startswith("1."))


def _share_of_weight_gradients(setup: Setup) -> float:
    """Of all linear layers. Frozen weights get none (LoRA, Hu et al. 2021)."""
    if setup.trains_adapters:
        return 0.0
    return min(1.0, setup.trained_parameters / setup.shape.parameters) if setup.mode == "reward" else 1.0


def linear_parameters(shape: Shape) -> int:
    """Of all blocks; the decoder's half of a T5 attends to the encoder as well, with four more matrices."""
    cross = 0
    if shape.kind == "t5":
        cross = shape.layers // 2 * 2 * shape.hidden * (shape.attention_width + shape.kv_width)
    return shape.layers * shape.linear_parameters_per_layer + cross


def linear_forward(shape: Shape) -> float:
    """FLOPs per token of all blocks' linear layers, forward."""
    return 2.0 * linear_parameters(shape)


def attention_forward(shape: Shape, seq_len: int) -> float:
    """FLOPs per token of all blocks' attention, forward."""
    return 4.0 * shape.layers * seq_len * shape.attention_width


def causal_share(shape: Shape) -> float:
    """Of all attention, what a causal mask halves: an encoder sees all of its sample, GLM all of its prompt."""
    return {"decoder": 1.0, "t5": 0.5}.get(shape.kind, 0.0)


def head_forward(shape: Shape) -> float:
    """FLOPs per token of the output head, forward."""
    return 2.0 * shape.embedding_parameters


def adapter_flops(setup: Setup) -> float:
    """FLOPs per token of LoRA's own matrices: forward, both gradients, and again where recomputed."""
    if not setup.trains_adapters:
        return 0.0
    return 2.0 * setup.adapter_parameters * (3 + recomputes_all(setup))


def model_flops(setup: Setup) -> float:
    """FLOPs per token that the model needs, nothing done twice counted: the numerator of MFU."""
    shape, done = setup.shape, passes(setup)
    recomputed = adapter_flops(setup) / (4 if recomputes_all(setup) else 3) * 3
    return (
        done.model_linear * linear_forward(shape)
        + done.model_attention * attention_forward(shape, setup.seq_len)
        + done.head * head_forward(shape)
        + recomputed
    )
