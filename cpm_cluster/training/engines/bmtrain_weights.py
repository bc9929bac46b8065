"""Whole weights into the ranks' parts and out of them again, tensor by tensor.

Rank 0 alone reads and writes files: torch before 2.1 cannot map one, and every rank would need memory for all of it.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Callable, Mapping

import torch
from torch import Tensor

from cpm_cluster.training.adapter import open_adapter
from cpm_cluster.training.engines.bmtrain_layers import Part, gather, keep_own
from cpm_cluster.training.engines.bmtrain_versions import Package
from cpm_cluster.training.errors import UserError
from cpm_cluster.training.files import write_atomically
from cpm_cluster.training.formats.loading import read_base_weights
from cpm_cluster.training.formats.tensor_files import Tensors
from cpm_cluster.training.model.decoder import check_weights, initial_weight
from cpm_cluster.training.model.lora import initial_factor, is_factor
from cpm_cluster.training.settings import Settings


def fill(bmt: Package, parts: Mapping[str, Part], settings: Settings, any_flag: Callable[[bool], bool]) -> None:
    """Fill the parts with the weights that the settings name, or with those that the torch engine draws. Collective.

    Raises UserError, on all ranks, when the weights do not fit.
    """
    base = {name: part for name, part in parts.items() if not is_factor(name)}
    factors = {name: part for name, part in parts.items() if is_factor(name)}
    if settings.init_from is not None:
        source = settings.init_from
        _send(bmt, base, _opened(bmt, source, lambda: _read_base(base, source, settings), any_flag))
    else:
        torch.manual_seed(settings.seed)
        for name, part in base.items():
            keep_own(bmt, part, initial_weight(name, part.shape, settings.model))
    if settings.adapter is not None:
        shapes = {name: part.shape for name, part in factors.items()}
        _send(bmt, factors, _opened(bmt, settings.adapter, lambda: open_adapter(settings, shapes), any_flag))
    else:
        torch.manual_seed(settings.seed)
        for name, part in factors.items():
            keep_own(bmt, part, initial_factor(name, part.shape))


def export(bmt: Package, parts: Mapping[str, Part], path: Path) -> None:
    """Write the whole parameters from rank 0, in the precision of the model, as BMTrain writes them. Collective."""
    weights = {}
    for name, part in parts.items():
        whole = gather(bmt, part)
        if bmt.rank() == 0:
            weights[name] = whole.cpu()
    if bmt.rank() == 0:
        write_atomically(path, partial(torch.save, weights))


def _read_base(base: Mapping[str, Part], source: str, settings: Settings) -> Tensors:
    weights = read_base_weights(source, settings.model)
    check_weights({name: part.shape for name, part in base.items()}, settings.model, weights, source)
    return weights


def _opened(
    bmt: Package, source: str, read: Callable[[], Tensors | None], any_flag: Callable[[bool], bool]
) -> Tensors | None:
    """Return what rank 0 reads, there."""
    weights, failure = None, None
    if bmt.rank() == 0:
        try:
            weights = read()
        except UserError as error:
            failure = error
    if any_flag(failure is not None):
        raise failure or UserError(f"rank 0 cannot use {source}; its message says why")
    return weights


def _send(bmt: Package, parts: Mapping[str, Part], weights: Tensors | None) -> None:
    """Send each whole tensor from rank 0 to the ranks, which keep their parts."""
    for name, part in parts.items():
        whole = torch.empty(part.shape, dtype=part.parameter.dtype, device="cuda")
        if weights is not None:
            whole.copy_(weights[name])
        with torch.no_grad():
            received: Tensor = bmt.distributed.broadcast(whole, 0)
        keep_own(bmt, part, received)
