"""The weights that a task on torch starts from, put into a model that has no memory yet.

Tensor by tensor: a file is mapped, random weights are drawn one after another, and of a sharded model a rank keeps its
rows. So a host needs memory for what its ranks keep, and one tensor for each of them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from cpm_cluster.training.adapter import open_adapter
from cpm_cluster.training.engines.fsdp import copy_into
from cpm_cluster.training.formats.loading import read_base_weights
from cpm_cluster.training.formats.tensor_files import Tensors
from cpm_cluster.training.model.decoder import CPM, check_weights, initial_weight
from cpm_cluster.training.model.lora import initial_factor, is_factor
from cpm_cluster.training.settings import Settings


class InitialWeights(NamedTuple):
    """The weights of ``init_from``, and the LoRA factors of ``adapter``; None where they are to be drawn."""

    base: Tensors | None
    factors: Tensors | None


def open_initial_weights(model: CPM, settings: Settings) -> InitialWeights:
    """Return what is read of the model, LoRA layers included; raises UserError where it does not fit."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    factors = open_adapter(settings, shapes)
    if settings.init_from is None:
        return InitialWeights(None, factors)
    base = read_base_weights(settings.init_from, settings.model)
    own = {name: shape for name, shape in shapes.items() if not is_factor(name)}
    check_weights(own, settings.model, base, settings.init_from)
    return InitialWeights(base, factors)


def fill(model: CPM, weights: InitialWeights, settings: Settings) -> None:
    """Fill the model, sharded or not; what is drawn is the same on every rank, in every sharding and engine."""
    base, factors = weights
    parameters = dict(model.named_parameters())
    torch.manual_seed(settings.seed)
    for name, parameter in parameters.items():
        if not is_factor(name):
            shape = parameter.shape
            copy_into(parameter, initial_weight(name, shape, settings.model) if base is None else base[name])
    torch.manual_seed(settings.seed)
    for name, parameter in parameters.items():
        if is_factor(name):
            copy_into(parameter, initial_factor(name, parameter.shape) if factors is None else factors[name])
