"""Memory on the host that a GPU's tensors are copied to."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

_PORTABLE = 1  # cudaHostRegisterPortable: pinned for all contexts


def host_memory_for(source: Tensor) -> Tensor:
    """Return an empty tensor on the CPU; for a tensor on a GPU its memory is pinned, where the system grants that.

    Ordinary memory is registered with CUDA, as DCP does it (torch/distributed/_state_dict_utils.py): what
    ``pin_memory=True`` returns is rounded up to the next power of two (pytorch#95823), up to twice the need.
    """
    memory = torch.empty(source.shape, dtype=source.dtype)
    if not source.is_cuda or memory.numel() == 0:
        return memory
    cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    address = memory.data_ptr()
    if int(cudart.cudaHostRegister(address, memory.numel() * memory.element_size(), _PORTABLE)) == 0:
        weakref.finalize(memory, cudart.cudaHostUnregister, address)
    return memory
