"""The weights that a run of the torch engine starts from, put into a model that has no memory yet.

Tensor by tensor: a file is mapped, random weights are drawn one after another, and of a sharded model a rank keeps its
rows. So a host needs memory for what its ranks keep, and one tensor for each of them.
"""

from __future__ import annotations

import torch

from cpm_cluster.training.engines.fsdp import copy_into
from cpm_cluster.training.formats.loading import read_base_weights
from cpm_cluster.training.formats.tensor_files import Tensors
from cpm_cluster.training.model.decoder import CPM, check_weights, initial_weight
from cpm_cluster.training.model.lora import initial_factor, is_factor
from cpm_cluster.training.settings import Settings


def open_base_weights(model: CPM, settings: Settings) -> Tensors | None:
    """Return the weights of ``init_from``, None where it is not set; raises UserError where they do not fit."""
    if settings.init_from is None:
        return None
    weights = read_base_weights(settings.init_from, settings.model)
    own = {name: parameter.shape for name, parameter in model.named_parameters() if not is_factor(name)}
    check_weights(own, settings.model, weights, settings.init_from)
    return weights


def fill(model: CPM, weights: Tensors | None, settings: Settings) -> None:
    """Fill the model, sharded or not; what is drawn is the same on every rank, in every sharding and engine."""
    parameters = dict(model.named_parameters())
    torch.manual_seed(settings.seed)
    for name, parameter in parameters.items():
        if not is_factor(name):
            shape = parameter.shape
            copy_into(parameter, initial_weight(name, shape, settings.model) if weights is None else weights[name])
    torch.manual_seed(settings.seed)
    for name, parameter in parameters.items():
        if is_factor(name):
            copy_into(parameter, initial_factor(name, parameter.shape))
