"""A CPM-9G style decoder: pre-norm, RMSNorm, rotary, grouped-query attention, SwiGLU, no biases, untied head.

Module names are chosen so that ``state_dict()`` has CPM-9G's keys; they map one to one to those of HF Llama.
Shapes: B rows, T tokens, H query heads, K key/value heads, D head_dim.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from cpm_cluster.training.attention import PackedLayout, attend, packed_layout, rotate
from cpm_cluster.training.errors import UserError
from cpm_cluster.training.layers import TORCH_LAYERS, LayerFactory
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

    def __init__(self, settings: ModelSettings, recompute: bool = False, make: LayerFactory = TORCH_LAYERS) -> None:
        super().__init__()
        self.settings = settings
        self.input_embedding = make.embedding(settings.vocab, settings.hidden)
        self.encoder = Encoder(settings, make, recompute)
        if not settings.tied_embeddings:
            self.lm_head = make.linear(settings.hidden, settings.vocab)

    def forward(self, input_ids: Tensor, documents: Tensor, positions: Tensor) -> Tensor:
        """Return the logits [B, T, vocab] of packed rows; all three inputs are [B, T] integers."""
        layout = packed_layout(documents, positions, self.settings.head_dim, self.settings.rope_theta)
        hidden = self.encoder(self.input_embedding(input_ids), layout)
        if self.settings.tied_embeddings:
            table: Any = self.input_embedding.weight
            return functional.linear(hidden, table)
        logits: Tensor = self.lm_head(hidden)
        return logits


def initialise(model: CPM) -> None:
    """Draw matrices from N(0, 0.02²), those into the residual stream from N(0, 0.02² / 2L) (GPT-2, §2.3)."""
    residual_std = _INIT_STD / math.sqrt(2 * model.settings.layers)
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            into_residual = name.endswith(("attention_out.weight", "w_out.weight"))
            nn.init.normal_(weight, std=residual_std if into_residual else _INIT_STD)


def load_weights(model: CPM, weights: dict[str, Tensor], source: str) -> None:
    """Copy CPM-9G style weights into the model.

    Raises UserError naming up to three keys that are missing, unknown or of another shape.
    """
    own = model.state_dict()
    wrong = [f"{name} is missing" for name in own if name not in weights]
    wrong += [f"{name} is unknown" for name in weights if name not in own]
    wrong += [
        f"{name} is {list(weights[name].shape)} instead of {list(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    if wrong:
        raise UserError(
            "{} does not fit model {}: {} key(s) differ, among them: {}".format(
                source, model.settings.name, len(wrong), "; ".join(wrong[:3])
            )
        )
    model.load_state_dict(weights)
