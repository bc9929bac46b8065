"""The torch process group: gloo on CPUs, NCCL on GPUs."""

from __future__ import annotations

import os
import socket

import torch
import torch.distributed as dist
from torch import Tensor

from cpm_cluster.training.errors import UserError
from cpm_cluster.training.placement import Placement


def choose_device(placement: Placement) -> torch.device:
    """Return this rank's own GPU, or the CPU where torch sees no GPU.

    Raises UserError when the node has fewer GPUs than ranks.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if placement.local_rank >= torch.cuda.device_count():
        raise UserError(f"local rank {placement.local_rank} has no GPU: torch sees {torch.cuda.device_count()} here")
    torch.cuda.set_device(placement.local_rank)
    return torch.device("cuda", placement.local_rank)


def announce(placement: Placement, device: torch.device) -> None:
    """Print where this rank runs: before it joins, because a rank that never joins is looked for."""
    gpu = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    print(
        f"rank {placement.rank} of {placement.world_size}: host {socket.gethostname()} pid {os.getpid()}"
        f" device {device}{gpu} torch {torch.__version__}",
        flush=True,
    )


def gather(own: Tensor) -> list[Tensor]:
    """Return every rank's tensor, in the order of ranks. Collective."""
    tensors = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(tensors, own)
    return tensors


def join_group(placement: Placement, device: torch.device) -> None:
    """Join the default process group; alone, without a port.

    Raises RuntimeError saying who waited where when the ranks do not meet.
    """
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "RANK" not in os.environ:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
        return
    try:
        dist.init_process_group(backend)
    except (RuntimeError, ValueError) as error:
        raise RuntimeError(
            "rank {} of {} did not meet the others at {}:{}: {}".format(
                placement.rank,
                placement.world_size,
                os.environ.get("MASTER_ADDR"),
                os.environ.get("MASTER_PORT"),
                error,
            )
        ) from error
