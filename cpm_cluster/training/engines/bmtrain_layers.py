"""The model's layers on BMTrain, and which elements of each parameter a rank holds.

Every parameter is BMTrain's ``DistributedParameter``: a rank holds one range of its elements. Parameters outside of
blocks are cut one by one; those of a block lie one after another in a storage, which is cut as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cpm_cluster.training.engines.bmtrain_versions import Package, block_type, make_block, make_linear
from cpm_cluster.training.model.layers import RMSNorm
from cpm_cluster.training.model.lora import LowRank, attach_lora
from cpm_cluster.training.settings import LoraTuning, Settings


class BMTrainLayers:
    """See :class:`cpm_cluster.training.model.layers.LayerFactory`; weights are not initialised, and frozen for LoRA."""

    def __init__(self, bmt: Package, settings: Settings, dtype: torch.dtype) -> None:
        self._bmt = bmt
        self._training = settings.training
        self._lora = settings.method if isinstance(settings.method, LoraTuning) else None
        self._dtype = dtype

    def linear(self, inputs: int, outputs: int) -> nn.Module:
        """Return a linear layer."""
        return make_linear(self._bmt, inputs, outputs, self._dtype).requires_grad_(self._lora is None)

    def embedding(self, vocabulary: int, hidden: int) -> nn.Module:
        """Return a table."""
        table = nn.utils.skip_init(nn.Embedding, vocabulary, hidden, dtype=self._dtype)  # type: ignore[no-untyped-call]
        return self._distributed(table)

    def norm(self, hidden: int, eps: float) -> nn.Module:
        """Return an RMSNorm."""
        return self._distributed(RMSNorm(hidden, eps).to(self._dtype))

    def block(self, layer: nn.Module) -> nn.Module:
        """Give the layer its LoRA updates, which a block must know from the start, and make it a block."""
        if self._lora is not None:
            attach_lora(layer, self._lora)
            for module in layer.modules():
                if isinstance(module, LowRank):
                    self._bmt.BMTrainModelWrapper(module.to(self._dtype))
        return make_block(self._bmt, layer, self._training.recompute == "full", self._training.zero_stage)

    def _distributed(self, module: nn.Module) -> nn.Module:
        distributed: nn.Module = self._bmt.BMTrainModelWrapper(module.requires_grad_(self._lora is None))
        return distributed


@dataclass(frozen=True)
class Part:
    """A rank's part of a parameter of this shape, which begins at ``offset`` of a storage of ``total`` elements."""

    parameter: nn.Parameter
    shape: torch.Size
    offset: int
    total: int

    def held_by(self, rank: int, world_size: int) -> range:
        """Return which elements of the whole, flat parameter a rank holds, maybe none."""
        share = -(-self.total // world_size)
        first, last = (min(max(0, edge * share - self.offset), self.shape.numel()) for edge in (rank, rank + 1))
        return range(first, last)


def parts_of(bmt: Package, model: nn.Module) -> dict[str, Part]:
    """Return the parts of all parameters, by the names of the state dict.

    Raises RuntimeError when this BMTrain cuts parameters otherwise than it is known to.
    """
    in_blocks: dict[int, tuple[int, int]] = {}
    for module in model.modules():
        if isinstance(module, block_type(bmt)):
            block: Any = module
            for info in block._param_info:
                total = block._storage_info[info["kw_name"]]["total"]
                in_blocks[id(info["parameter"])] = (info["offset"], total)
    parts = {}
    for name, parameter in model.named_parameters():
        shape: torch.Size = parameter._original_shape  # type: ignore[attr-defined]
        offset, total = in_blocks.get(id(parameter), (0, shape.numel()))
        parts[name] = Part(parameter, shape, offset, total)
        held = parts[name].held_by(bmt.rank(), bmt.world_size())
        if len(held) != parameter.numel():
            raise RuntimeError(f"BMTrain holds {parameter.numel()} elements of {name} here, not {held}")
    return parts


def gather(bmt: Package, part: Part) -> Tensor:
    """Return the whole parameter, on the device. Collective."""
    world_size = bmt.world_size()
    ranges = [part.held_by(rank, world_size) for rank in range(world_size)]
    own = part.parameter.detach().flatten()
    padded = own.new_zeros(max(len(held) for held in ranges))
    padded[: own.numel()] = own
    gathered = bmt.distributed.all_gather(padded)
    pieces = [gathered[rank, : len(held)] for rank, held in enumerate(ranges)]
    return torch.cat(pieces).view(part.shape)


def keep_own(bmt: Package, part: Part, whole: Tensor) -> None:
    """Copy this rank's elements of a whole tensor into the parameter."""
    with torch.no_grad():
        held = part.held_by(bmt.rank(), bmt.world_size())
        part.parameter.detach().copy_(whole.detach().reshape(-1)[held.start : held.stop])
