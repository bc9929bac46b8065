"""LoRA: a frozen linear layer plus a trainable low-rank update (Hu et al. 2021).

y = W x + (alpha / rank) B A x, with A [rank, in] drawn at random and B [out, rank] zero, so that training
starts from the base model. Keys are OpenDelta's, as CPM-9G's scripts write them: ``….project_q.lora.lora_A``
and ``….lora_B``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cpm_cluster.training.errors import UserError
from cpm_cluster.training.settings import LoraTuning

LORA_TARGETS = ("project_q", "project_k", "project_v", "attention_out", "w_0", "w_1", "w_out")
_FACTOR_A, _FACTOR_B = ".lora.lora_A", ".lora.lora_B"


class LowRank(nn.Module):
    """The update (alpha / rank) B A x of one linear layer; dropout applies to x."""

    def __init__(self, inputs: int, outputs: int, lora: LoraTuning) -> None:
        super().__init__()
        self._scale = lora.alpha / lora.rank
        self._dropout = lora.dropout
        self.lora_A = nn.Parameter(torch.empty(lora.rank, inputs))
        self.lora_B = nn.Parameter(torch.zeros(outputs, lora.rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        kept = functional.dropout(inputs, self._dropout, self.training)
        return functional.linear(functional.linear(kept, self.lora_A), self.lora_B) * self._scale


def attach_lora(model: nn.Module, lora: LoraTuning) -> None:
    """Freeze the model and give each target layer a trainable update.

    A forward hook adds the update, so the layer stays the engine's own and the base keys do not change.
    """
    model.requires_grad_(False)
    for name, layer in list(model.named_modules()):
        if name.split(".")[-1] in lora.targets:
            outputs, inputs = layer.weight.shape
            layer.add_module("lora", LowRank(inputs, outputs, lora))
            layer.register_forward_hook(_add_update)


def merge_lora(weights: dict[str, Tensor], delta: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """Return the base weights with every update folded in: W + (alpha / rank) B A, computed in fp32.

    Raises UserError when the delta updates a layer that the base does not have, or in another shape.
    """
    merged = dict(weights)
    for key, factor_a in delta.items():
        if not key.endswith(_FACTOR_A):
            continue
        layer = key[: -len(_FACTOR_A)]
        name, factor_b = layer + ".weight", delta.get(layer + _FACTOR_B)
        base = weights.get(name)
        if base is None or factor_b is None or base.shape != (factor_b.shape[0], factor_a.shape[1]):
            raise UserError(f"the delta of {name} does not fit the base weights")
        update = factor_b.float() @ factor_a.float() * (alpha / factor_a.shape[0])
        merged[name] = (base.float() + update).to(base.dtype)
    return merged


def _add_update(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    update: Tensor = layer.lora(inputs[0])  # type: ignore[operator]
    return output + update
