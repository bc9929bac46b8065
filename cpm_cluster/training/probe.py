"""Whether two sets of weights are the same model: the logits of both for a probe batch, layer by layer.

One layer is in memory at a time, in fp32, so that 100B parameters need no more than a few GB.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from cpm_cluster.training.errors import UserError
from cpm_cluster.training.formats.tensor_files import Tensors
from cpm_cluster.training.model.attention import packed_layout, portable_kernel, rotary_angles
from cpm_cluster.training.model.decoder import DecoderLayer
from cpm_cluster.training.model.layers import RMSNorm, UninitialisedLayers
from cpm_cluster.training.model.lora import Delta, attach_lora
from cpm_cluster.training.settings import LoraTuning, ModelSettings

_TOKENS, _SEED = 32, 9
# How far rounding the merged weights to their number type may move a logit, in standard deviations of the logits: more
# than twice what random models of up to 48 layers came to (1.8e-5, 1.1e-2, 8.3e-2).
TOLERANCES = {torch.float32: 1e-4, torch.float16: 2.5e-2, torch.bfloat16: 2e-1}


class Difference(NamedTuple):
    """The largest difference of a logit, and what it may be."""

    largest: float
    tolerance: float


def require_equal(model: ModelSettings, base: Tensors, delta: Delta, merged: Tensors) -> Difference:
    """Compare base and delta side by side with the merged weights; raises UserError where they are not the same model.

    The tolerance depends on the number type of the merged weights.
    """
    expected = probe_logits(model, base, delta)
    tolerance = TOLERANCES[merged["encoder.output_layernorm.weight"].dtype] * float(expected.std())
    largest = float((probe_logits(model, merged) - expected).abs().max())
    if not largest <= tolerance:  # nor where it is no number
        raise UserError(
            f"the merged weights are not the model that was trained: a logit differs by {largest:.2g}, and rounding"
            f" explains {tolerance:.2g}; export them in another dtype, or the adapter alone (--format lora)"
        )
    return Difference(largest, tolerance)


def probe_logits(model: ModelSettings, weights: Tensors, delta: Delta | None = None) -> Tensor:
    """Return the logits [tokens, vocab] in fp32 of a fixed text of tokens from all of the vocabulary."""
    draw = torch.Generator().manual_seed(_SEED)
    ids = torch.randint(model.vocab, (1, _TOKENS), generator=draw)
    rotation = rotary_angles(torch.arange(_TOKENS)[None], model.head_dim, model.rope_theta)
    layout = packed_layout(torch.zeros_like(ids), rotation, portable_kernel(), torch.float32, None, None)
    with torch.no_grad():
        hidden = weights["input_embedding.weight"][ids].float()
        layer: nn.Module = DecoderLayer(model, UninitialisedLayers(torch.float32))
        if delta is not None:
            attach_lora(layer, LoraTuning("lora", delta.rank, delta.alpha, 0.0, delta.targets))
        layer.to_empty(device="cpu").eval()
        for number in range(model.layers):
            for name, parameter in layer.named_parameters():
                full = f"encoder.layers.{number}.{name}"
                source = delta.factors if delta is not None and full in delta.factors else weights
                parameter.copy_(source[full])
            hidden = layer(hidden, layout)
        norm = RMSNorm(model.hidden, model.norm_eps)
        norm.weight.copy_(weights["encoder.output_layernorm.weight"])
        head = weights["input_embedding.weight" if model.tied_embeddings else "lm_head.weight"]
        return functional.linear(norm(hidden), head.float())[0]
