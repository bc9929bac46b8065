"""BMTrain 0.2.3 and 1.0, told apart by what their functions accept, never by the version that they state.

0.2.3 has one ZeRO stage for all, knows fp16 and fp32, and always recomputes; 1.0 takes stage and recomputation by the
block, and knows bf16.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from importlib import metadata
from inspect import signature
from pathlib import Path
from typing import Any, Iterable, Iterator

import torch
from torch import nn

from cpm_cluster.training.errors import UserError
from cpm_cluster.training.placement import Placement

# The package, whose types nobody states.
Package = Any

_NCCL = "libnccl.so.2"


def import_bmtrain() -> Package:
    """Return the package ``bmtrain``; raises UserError that says what it lacks."""
    _load_nccl()
    try:
        return importlib.import_module("bmtrain")
    except ModuleNotFoundError as error:
        if error.name != "bmtrain":
            raise UserError(f"engine bmtrain: {error} (needed by BMTrain {version()})") from error
        raise UserError("engine bmtrain: BMTrain is not installed here; name an image that has it") from error
    except (ImportError, OSError, TypeError) as error:  # TypeError: it looks for NCCL in a package without __file__
        raise UserError(
            f"engine bmtrain: BMTrain {version()} cannot be loaded ({error}): it needs {_NCCL} and a CUDA driver"
        ) from error


def version() -> str:
    """Return the installed version, for messages."""
    try:
        return metadata.version("bmtrain")
    except metadata.PackageNotFoundError:
        return "(unknown version)"


def join(bmt: Package, placement: Placement, seed: int, zero_stage: int) -> None:
    """Meet the other ranks and make the NCCL communicator.

    BMTrain reads torchrun's variables. Alone, a free port serves: its own default is the same for every run of a node.
    Raises RuntimeError saying who waited where when the ranks do not meet.
    """
    if "RANK" not in os.environ:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    stage = {"zero_level": zero_stage} if "zero_level" in signature(bmt.init_distributed).parameters else {}
    try:
        bmt.init_distributed(seed=seed, **stage)
    except (RuntimeError, ValueError) as error:
        where = "{}:{}".format(os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"])
        raise RuntimeError(
            f"rank {placement.rank} of {placement.world_size} did not meet the others at {where}: {error}"
        ) from error


def block_type(bmt: Package) -> Any:
    """Return the class that gathers a layer's weights around its forward and backward pass."""
    return getattr(bmt, "Block", bmt.CheckpointBlock)


def make_block(bmt: Package, layer: nn.Module, recompute: bool, zero_stage: int) -> nn.Module:
    """Wrap a decoder layer; its parameters, all distributed ones, move into storage that the block shards."""
    block: nn.Module
    if always_recomputes(bmt):
        block = bmt.CheckpointBlock(layer)
    else:
        block = bmt.Block(layer, use_checkpoint=recompute, zero_level=zero_stage)
    return block


def chain(bmt: Package, blocks: Iterable[nn.Module]) -> nn.Module:
    """Return the blocks as a list in which gradients are reduced while the next block computes."""
    listed = list(blocks)
    stack: nn.Module = _AllAtOnce.of(bmt)(listed) if always_recomputes(bmt) else bmt.TransformerBlockList(listed)
    return stack


def always_recomputes(bmt: Package) -> bool:
    """Whether activations are recomputed whatever one asks for."""
    return "use_checkpoint" not in signature(block_type(bmt).__init__).parameters


def make_linear(bmt: Package, inputs: int, outputs: int, dtype: torch.dtype) -> nn.Module:
    """Return a linear layer without bias, weight uninitialised.

    1.0's own keeps no gathered weight for the backward pass; torch's does, which matters without recomputation alone.
    """
    if hasattr(bmt, "nn"):
        own: nn.Module = bmt.nn.Linear(inputs, outputs, bias=False, dtype=dtype)
        return own
    plain = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=False, dtype=dtype)  # type: ignore[no-untyped-call]
    distributed: nn.Module = bmt.BMTrainModelWrapper(plain)
    return distributed


def check_precision(bmt: Package, precision: str) -> None:
    """Raise UserError for bf16 where BMTrain or the GPU lacks it."""
    if precision != "bf16":
        return
    functions = importlib.import_module("bmtrain.optim._function")
    if not hasattr(functions, "adam_bf16"):
        raise UserError(f"precision bf16 needs BMTrain 1.0, this is {version()}; use fp16")
    if not functions.C.is_bf16_supported():
        raise UserError("precision bf16 needs a GPU of the Ampere generation or newer; use fp16")


class _AllAtOnce:
    """0.2.3 overlaps the reduction of gradients with computation in ``TransformerBlockList.forward`` alone.

    So the list is made to look like one layer to those who call layer after layer. Keys do not change.
    """

    def __iter__(self) -> Iterator[Any]:
        yield self

    @classmethod
    def of(cls, bmt: Package) -> Any:
        """Return BMTrain's list with this way to go through it."""
        return type("TransformerBlockList", (cls, bmt.TransformerBlockList), {})


def _load_nccl() -> None:
    """Map NCCL before BMTrain looks for it: that finds it in one of NVIDIA's several packages alone."""
    for candidate in (_NCCL, *_packaged_nccl()):
        try:
            ctypes.CDLL(candidate, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return


def _packaged_nccl() -> Iterator[str]:
    try:
        found = importlib.util.find_spec("nvidia.nccl")
    except ModuleNotFoundError:
        return
    for directory in (found.submodule_search_locations or ()) if found else ():
        yield str(Path(directory) / "lib" / _NCCL)
