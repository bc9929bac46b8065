"""FSDP2: shard a model's parameters over the ranks, and move tensors between whole and sharded.

Imports happen inside the functions, because torch older than 2.6 has no ``fully_shard`` and needs none for
DDP.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cpm_cluster.training.errors import UserError
from cpm_cluster.training.model.decoder import CPM


def shard_model(model: CPM, device: torch.device, compute_type: torch.dtype | None, reshard: bool) -> None:
    """Shard each decoder layer, then the rest, in place; parameters and reductions stay fp32.

    ``reshard``: gathered weights are dropped after the forward pass (ZeRO-3), else kept for the backward (ZeRO-2).

    Raises UserError where torch has no FSDP2.
    """
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    except ImportError as error:
        raise UserError(
            f"training.zero_stage above 0 needs torch 2.6 or newer, this is {torch.__version__}; use 0 (DDP)"
        ) from error
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=compute_type, reduce_dtype=torch.float32)
    for layer in model.encoder.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)


def shards_mixed_types() -> bool:
    """Return whether a layer's frozen parameters may be of another type than those that are trained."""
    release = tuple(int(number) for number in torch.__version__.split(".")[:2])
    return release >= (2, 9)


def whole(tensor: Tensor) -> Tensor:
    """Return the whole of a sharded tensor (collective), and any other tensor as it is."""
    gather: Any = getattr(tensor, "full_tensor", None)
    full: Tensor = tensor if gather is None else gather()
    return full


def copy_into(parameter: Tensor, full: Tensor) -> None:
    """Copy a whole tensor into a parameter, or this rank's rows: FSDP2 deals them out in order, in equal parts."""
    with torch.no_grad():
        part: Any = getattr(parameter, "to_local", None)
        if part is None:
            parameter.copy_(full)
            return
        own = part()
        first = dist.get_rank() * -(-full.shape[0] // dist.get_world_size())
        own.copy_(full[first : first + own.shape[0]])
