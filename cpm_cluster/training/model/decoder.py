"""A CPM-9G style decoder: pre-norm, RMSNorm, rotary, grouped-query attention, SwiGLU, no biases, untied head.

Module names are chosen so that ``state_dict()`` has CPM-9G's keys; they map one to one to those of HF Llama.
Shapes: B rows, T tokens, H query heads, K key/value heads, D head_dim.
"""

from __future__ import annotations

import math
from typing import Any, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from cpm_cluster.training.errors import UserError
from cpm_cluster.training.model.attention import (
    Kernel,
    KeyValueCache,
    PackedLayout,
    Segments,
    attend,
    packed_layout,
    portable_kernel,
    rotary_angles,
    rotate,
)
from cpm_cluster.training.model.layers import TORCH_LAYERS, LayerFactory
from cpm_cluster.training.settings import ModelSettings

_INIT_STD = 0.02


class SelfAttention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, settings: ModelSettings, make: LayerFactory) -> None:
        super().__init__()
        self._head_dim = settings.head_dim
        query, key = settings.heads * settings.head_dim, settings.kv_heads * settings.head_dim
        self.project_q = make.linear(settings.hidden, query)
        self.project_k = make.linear(settings.hidden, key)
        self.project_v = make.linear(settings.hidden, key)
        self.attention_out = make.linear(query, settings.hidden)

    def forward(self, hidden: Tensor, layout: PackedLayout) -> Tensor:
        """[B, T, hidden] to [B, T, hidden]."""
        by_head = (*hidden.shape[:2], -1, self._head_dim)
        query = rotate(self.project_q(hidden).view(by_head), layout.rotation)
        key = rotate(self.project_k(hidden).view(by_head), layout.rotation)
        value = self.project_v(hidden).view(by_head)
        if layout.cache is not None:
            key, value = layout.cache.extend(self, key, value)
        mixed: Tensor = self.attention_out(attend(query, key, value, layout).flatten(2))
        return mixed


class AttentionBlock(nn.Module):
    """Norm, attention, residual."""

    def __init__(self, settings: ModelSettings, make: LayerFactory) -> None:
        super().__init__()
        self.layernorm_before_attention = make.norm(settings.hidden, settings.norm_eps)
        self.self_attention = SelfAttention(settings, make)

    def forward(self, hidden: Tensor, layout: PackedLayout) -> Tensor:
        """[B, T, hidden] to [B, T, hidden]."""
        mixed: Tensor = self.self_attention(self.layernorm_before_attention(hidden), layout)
        return hidden + mixed


class GatedInput(nn.Module):
    """SiLU(x W_0ᵀ) · (x W_1ᵀ) (Shazeer 2020, GLU variants, eq. 6)."""

    def __init__(self, settings: ModelSettings, make: LayerFactory) -> None:
        super().__init__()
        self.w_0 = make.linear(settings.hidden, settings.ffn)
        self.w_1 = make.linear(settings.hidden, settings.ffn)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, T, hidden] to [B, T, ffn]."""
        gated: Tensor = functional.silu(self.w_0(hidden)) * self.w_1(hidden)
        return gated


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, settings: ModelSettings, make: LayerFactory) -> None:
        super().__init__()
        self.w_in = GatedInput(settings, make)
        self.w_out = make.linear(settings.ffn, settings.hidden)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, T, hidden] to [B, T, hidden]."""
        output: Tensor = self.w_out(self.w_in(hidden))
        return output


class FeedForwardBlock(nn.Module):
    """Norm, SwiGLU, residual."""

    def __init__(self, settings: ModelSettings, make: LayerFactory) -> None:
        super().__init__()
        self.layernorm_before_ffn = make.norm(settings.hidden, settings.norm_eps)
        self.ffn = FeedForward(settings, make)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, T, hidden] to [B, T, hidden]."""
        output: Tensor = self.ffn(self.layernorm_before_ffn(hidden))
        return hidden + output


class DecoderLayer(nn.Module):
    """One layer: attention block, then feed-forward block."""

    def __init__(self, settings: ModelSettings, make: LayerFactory) -> None:
        super().__init__()
        self.self_att = AttentionBlock(settings, make)
        self.ffn = FeedForwardBlock(settings, make)

    def forward(self, hidden: Tensor, layout: PackedLayout) -> Tensor:
        """[B, T, hidden] to [B, T, hidden]."""
        output: Tensor = self.ffn(self.self_att(hidden, layout))
        return output


class Encoder(nn.Module):
    """The stack of layers and the final norm ("encoder" is CPM's name for it)."""

    def __init__(self, settings: ModelSettings, make: LayerFactory, recompute: bool) -> None:
        super().__init__()
        self._recompute = recompute
        self.layers = nn.ModuleList(make.block(DecoderLayer(settings, make)) for _ in range(settings.layers))
        self.output_layernorm = make.norm(settings.hidden, settings.norm_eps)

    def forward(self, hidden: Tensor, layout: PackedLayout) -> Tensor:
        """[B, T, hidden] to [B, T, hidden]."""
        for layer in self.layers:
            if self._recompute and torch.is_grad_enabled():
                hidden = checkpoint(layer, hidden, layout, use_reentrant=False)
            else:
                hidden = layer(hidden, layout)
        output: Tensor = self.output_layernorm(hidden)
        return output


class CPM(nn.Module):
    """The decoder. ``recompute`` trades a second forward pass a layer for its activations' memory."""

    def __init__(
        self,
        settings: ModelSettings,
        recompute: bool = False,
        make: LayerFactory = TORCH_LAYERS,
        kernel: Kernel | None = None,
    ) -> None:
        super().__init__()
        self.settings = settings
        self._kernel = kernel or portable_kernel()
        self.input_embedding = make.embedding(settings.vocab, settings.hidden)
        self.encoder = Encoder(settings, make, recompute)
        if not settings.tied_embeddings:
            self.lm_head = make.linear(settings.hidden, settings.vocab)

    def forward(
        self,
        input_ids: Tensor,
        documents: Tensor,
        positions: Tensor,
        segments: Segments | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Return the logits [B, T, vocab] of packed rows; ids, documents and positions are [B, T] integers.

        Segments that are known beforehand spare a wait for the GPU. With a cache the rows continue those that are in
        it, and the logits are those of their last tokens alone, [B, 1, vocab].
        """
        hidden = self.input_embedding(input_ids)
        rotation = rotary_angles(positions, self.settings.head_dim, self.settings.rope_theta)
        layout = packed_layout(documents, rotation, self._kernel, hidden.dtype, segments, cache)
        hidden = self.encoder(hidden, layout)
        if cache is not None:
            hidden = hidden[:, -1:]
        if self.settings.tied_embeddings:
            table: Any = self.input_embedding.weight
            return functional.linear(hidden, table)
        logits: Tensor = self.lm_head(hidden)
        return logits


def initial_weight(name: str, shape: Sequence[int], settings: ModelSettings) -> Tensor:
    """Draw a matrix (see :func:`initial_deviation`); the weights of a norm are 1."""
    if len(shape) == 1:
        return torch.ones(shape)
    return nn.init.normal_(torch.empty(shape), std=initial_deviation(name, settings))


def initial_deviation(name: str, settings: ModelSettings) -> float:
    """Matrices are from N(0, 0.02²), those into the residual stream from N(0, 0.02² / 2L) (GPT-2, §2.3)."""
    into_residual = name.endswith(("attention_out.weight", "w_out.weight"))
    return _INIT_STD / math.sqrt(2 * settings.layers) if into_residual else _INIT_STD


def check_weights(
    own: Mapping[str, torch.Size], settings: ModelSettings, weights: Mapping[str, Tensor], source: str
) -> None:
    """Raise UserError naming up to three keys that are missing, unknown or of another shape than ``own``."""
    wrong = [f"{name} is missing" for name in own if name not in weights]
    wrong += [f"{name} is unknown" for name in weights if name not in own]
    wrong += [
        f"{name} is {list(weights[name].shape)} instead of {list(shape)}"
        for name, shape in own.items()
        if name in weights and weights[name].shape != shape
    ]
    if wrong:
        raise UserError(
            "{} does not fit model {}: {} key(s) differ, among them: {}".format(
                source, settings.name, len(wrong), "; ".join(wrong[:3])
            )
        )
