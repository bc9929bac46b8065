"""Attention over packed rows: several documents share a row and must not see one another.

:func:`attend` is the one attention function of the model. A kernel that takes segment lengths
(flash-attention's varlen interface) slots in here: :class:`PackedLayout` holds what it needs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class PackedLayout:
    """What attention must know about a batch of B packed rows of T tokens.

    ``documents`` [B, T] numbers each token's document within its row; ``visible`` [B, 1, T, T] is true where
    a query (third axis) may see a key (fourth); ``rotation`` is the cosine and sine [B, T, 1, head_dim] of
    each position.
    """

    documents: Tensor
    visible: Tensor
    rotation: tuple[Tensor, Tensor]


def packed_layout(documents: Tensor, positions: Tensor, head_dim: int, theta: float) -> PackedLayout:
    """Return the layout of rows whose tokens belong to ``documents`` [B, T] at ``positions`` [B, T]."""
    length = documents.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=documents.device).tril()
    same_document = documents[:, :, None] == documents[:, None, :]
    visible = (same_document & causal)[:, None]
    return PackedLayout(documents, visible, rotary_angles(positions, head_dim, theta))


def rotary_angles(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return cosine and sine, each [B, T, 1, head_dim], of the rotary embedding.

    Position p turns pair i by ``p * theta ** (-2 i / head_dim)`` (Su et al. 2021, RoFormer, eq. 15).
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions[:, :, None, None].float() * theta**-exponents
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(heads: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn ``heads`` [B, T, H, D]; pairs are (i, i + D/2), the "half rotation" of CPM-9G and Llama."""
    cosine, sine = rotation
    first, second = heads.float().chunk(2, dim=-1)
    turned = heads.float() * cosine + torch.cat((-second, first), dim=-1) * sine
    return turned.to(heads.dtype)


def attend(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout) -> Tensor:
    """Return softmax(Q Kᵀ / √D) V within each document, causally: [B, T, H, D].

    ``query`` is [B, T, H, D]; ``key`` and ``value`` are [B, T, K, D] where K divides H (grouped-query
    attention).
    """
    group = query.shape[2] // key.shape[2]
    query = query.transpose(1, 2)
    key = key.transpose(1, 2).repeat_interleave(group, dim=1)
    value = value.transpose(1, 2).repeat_interleave(group, dim=1)
    return _masked_attention(query, key, value, layout.visible).transpose(1, 2)


def plain_attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    """Attention [B, H, T, D] written out: the reference, and what torch older than 2.0 runs."""
    scores = (query @ key.transpose(-1, -2)).float() / math.sqrt(query.shape[-1])
    return scores.masked_fill(~visible, -math.inf).softmax(dim=-1).to(value.dtype) @ value


def _masked_attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    fused = getattr(functional, "scaled_dot_product_attention", None)
    if fused is None:
        return plain_attention(query, key, value, visible)
    result: Tensor = fused(query, key, value, attn_mask=visible)
    return result
