"""LoRA: a frozen linear layer plus a trainable low-rank update (Hu et al. 2021).

y = W x + (alpha / rank) B A x, with A [rank, in] drawn at random and B [out, rank] zero, so that training
starts from the base model. Keys are OpenDelta's, as CPM-9G's scripts write them: ``….project_q.lora.lora_A``
and ``….lora_B``.
"""

from __future__ import annotations

import math
from typing import Any, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from cpm_cluster.training.errors import UserError
from cpm_cluster.training.formats.tensor_files import LazyTensors, changed
from cpm_cluster.training.settings import LoraTuning

LORA_TARGETS = ("project_q", "project_k", "project_v", "attention_out", "w_0", "w_1", "w_out")
FACTOR_A, FACTOR_B = ".lora.lora_A", ".lora.lora_B"


class LowRank(nn.Module):
    """The update (alpha / rank) B A x of one linear layer; dropout applies to x."""

    def __init__(self, inputs: int, outputs: int, lora: LoraTuning) -> None:
        super().__init__()
        self._scale = lora.alpha / lora.rank
        self._dropout = lora.dropout
        self.lora_A = nn.Parameter(initial_factor(FACTOR_A, (lora.rank, inputs)))
        self.lora_B = nn.Parameter(initial_factor(FACTOR_B, (outputs, lora.rank)))

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        kept = functional.dropout(inputs, self._dropout, self.training)
        return functional.linear(functional.linear(kept, self.lora_A), self.lora_B) * self._scale


def initial_factor(name: str, shape: Sequence[int]) -> Tensor:
    """Draw A, uniform within ±1/√in; B is zero."""
    if name.endswith(FACTOR_B):
        return torch.zeros(shape)
    return nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5))


def attach_lora(model: nn.Module, lora: LoraTuning) -> None:
    """Freeze the model and give each target layer a trainable update.

    A forward hook adds the update, so the layer stays the engine's own and the base keys do not change.
    """
    model.requires_grad_(False)
    for name, layer in list(model.named_modules()):
        if name.split(".")[-1] in lora.targets:
            outputs, inputs = layer.weight.shape
            update = LowRank(inputs, outputs, lora)
            layer.add_module("lora", update.to("meta") if layer.weight.is_meta else update)
            layer.register_forward_hook(_add_update)


class Delta:
    """The updates of a model: factors A and B by their names in the state dict, and the alpha of all of them.

    ``alpha_is_assumed`` where the file does not say it.
    """

    def __init__(self, factors: Mapping[str, Tensor], alpha: float, alpha_is_assumed: bool = False) -> None:
        self.factors, self.alpha, self.alpha_is_assumed = factors, alpha, alpha_is_assumed

    @property
    def rank(self) -> int:
        """The rank; raises UserError where layers differ in it."""
        ranks = {sum(self.factors[name].shape[:1]) for name in self.factors if name.endswith(FACTOR_A)}
        if len(ranks) != 1:
            raise UserError(f"the updates have ranks {sorted(ranks)}, and one is needed")
        return ranks.pop()

    @property
    def targets(self) -> tuple[str, ...]:
        """The last names of the layers that are updated."""
        return tuple(sorted({split_factor(name)[0].rpartition(".")[2] for name in self.factors}))


def is_factor(name: str) -> bool:
    """Return whether a name of the state dict is that of a factor."""
    return name.endswith((FACTOR_A, FACTOR_B))


def split_factor(name: str) -> tuple[str, str]:
    """Return the layer of a factor's name, and which factor it is."""
    factor = FACTOR_A if name.endswith(FACTOR_A) else FACTOR_B
    return name[: -len(factor)], factor


def check_delta(shapes: Mapping[str, Sequence[int]], delta: Delta) -> None:
    """Raise UserError when the delta updates a weight that is not among these, or in another shape."""
    for layer in {split_factor(name)[0] for name in delta.factors}:
        factor_a, factor_b = delta.factors.get(layer + FACTOR_A), delta.factors.get(layer + FACTOR_B)
        shape = shapes.get(layer + ".weight")
        if (
            shape is None
            or factor_a is None
            or factor_b is None
            or factor_a.shape[0] != factor_b.shape[1]
            or tuple(shape) != (factor_b.shape[0], factor_a.shape[1])
        ):
            raise UserError(f"the delta of {layer}.weight does not fit the base weights")


def merged(weights: Mapping[str, Tensor], delta: Delta) -> LazyTensors:
    """Return the base weights with every update folded in, W + (alpha / rank) B A, computed in fp32 when read.

    The number type stays that of the base. Raises UserError as :func:`check_delta` does.
    """
    updated = {split_factor(name)[0] + ".weight" for name in delta.factors}
    check_delta({name: weights[name].shape for name in updated if name in weights}, delta)

    def fold(name: str, base: Tensor) -> Tensor:
        if name not in updated:
            return base
        layer = name[: -len(".weight")]
        factor_a, factor_b = delta.factors[layer + FACTOR_A], delta.factors[layer + FACTOR_B]
        update = factor_b.float() @ factor_a.float() * (delta.alpha / factor_a.shape[0])
        return (base.float() + update).to(base.dtype)

    return changed(weights, fold)


def _add_update(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    update: Tensor = layer.lora(inputs[0])  # type: ignore[operator]
    return output + update
