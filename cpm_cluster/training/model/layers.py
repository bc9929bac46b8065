"""The weighted layers that a model is made of, and the factory that lets an engine bring its own."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn


class LayerFactory(Protocol):
    """Makes layers whose only parameter is ``weight``, so that all engines write the same state-dict keys."""

    def linear(self, inputs: int, outputs: int) -> nn.Module:
        """Return a layer without bias, weight [outputs, inputs]."""

    def embedding(self, vocabulary: int, hidden: int) -> nn.Module:
        """Return a table, weight [vocabulary, hidden]."""

    def norm(self, hidden: int, eps: float) -> nn.Module:
        """Return an RMSNorm, weight [hidden]."""

    def block(self, layer: nn.Module) -> nn.Module:
        """Wrap one decoder layer; its parameters' names must not change."""


class RMSNorm(nn.Module):
    """x / √(mean(x²) + eps) · weight, in fp32 (Zhang and Sennrich 2019, eq. 4)."""

    def __init__(self, hidden: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden))

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalise the last axis of ``hidden`` [..., hidden]; shape and type stay."""
        wide = hidden.float()
        normalised = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return normalised.to(hidden.dtype) * self.weight.to(hidden.dtype)


class TorchLayers:
    """Plain torch layers."""

    def linear(self, inputs: int, outputs: int) -> nn.Module:
        """Return ``nn.Linear`` without bias."""
        return nn.Linear(inputs, outputs, bias=False)

    def embedding(self, vocabulary: int, hidden: int) -> nn.Module:
        """Return ``nn.Embedding``."""
        return nn.Embedding(vocabulary, hidden)

    def norm(self, hidden: int, eps: float) -> nn.Module:
        """Return :class:`RMSNorm`."""
        return RMSNorm(hidden, eps)

    def block(self, layer: nn.Module) -> nn.Module:
        """Return the layer itself."""
        return layer


TORCH_LAYERS = TorchLayers()


class UninitialisedLayers(TorchLayers):
    """Plain torch layers without memory (on torch's meta device), for weights that are read.

    All are of one type, but for the linear layers if these have another.
    """

    def __init__(self, dtype: torch.dtype, linear: torch.dtype | None = None) -> None:
        self._where: Any = {"device": "meta", "dtype": dtype}
        self._linear: Any = {"device": "meta", "dtype": linear or dtype}

    def linear(self, inputs: int, outputs: int) -> nn.Module:
        """See :class:`TorchLayers`."""
        return nn.Linear(inputs, outputs, bias=False, **self._linear)

    def embedding(self, vocabulary: int, hidden: int) -> nn.Module:
        """See :class:`TorchLayers`."""
        return nn.Embedding(vocabulary, hidden, **self._where)

    def norm(self, hidden: int, eps: float) -> nn.Module:
        """See :class:`TorchLayers`."""
        return super().norm(hidden, eps).to(**self._where)
