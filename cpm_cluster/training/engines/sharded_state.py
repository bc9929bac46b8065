"""Named tensors of all ranks in one directory, each part written once, in the format of torch's DCP.

DCP is ``torch.distributed.checkpoint`` (torch 2.4 or newer, imported inside the functions). Its planners decide who
writes what, its files and its index are read by any DCP tool, and onto any number of ranks, sharded or not. But
``dcp.save`` and ``dcp.async_save`` talk to the other ranks from the thread that writes: that takes a second process
group, and hangs where a rank has died. Here the ranks talk on the main thread alone, before the writing (DCP's
plan) and after it (DCP's index); the thread between only writes.

``dcp.load`` reads the index with pickle, which can run code. Nothing is read here before its SHA-256 was found equal
to the manifest's, but who can write the one can write the other: so :func:`read_index` admits nothing but the index's
own types, and tensors are read with ``weights_only``.
"""

from __future__ import annotations

import pickle
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import IO, Any, Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from cpm_cluster.training.engines.staging import host_memory_for
from cpm_cluster.training.errors import UserError
from cpm_cluster.training.files import naming

_INDEX = ".metadata"
_INDEX_TYPES = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "TensorProperties",
        "ChunkStorageMetadata",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
}


def require_dcp() -> None:
    """Import DCP, which takes a second, before the first step; raises UserError where torch has none that fits."""
    try:
        from torch.distributed.checkpoint import default_planner, filesystem  # noqa: F401 - for those who need them
        from torch.distributed.checkpoint.metadata import StorageMeta  # noqa: F401 - torch 2.4 brought it
    except ImportError as error:
        raise UserError(
            f"for checkpoints engine torch needs torch 2.4 or newer, this is {torch.__version__};"
            " name engine bmtrain, or a newer image"
        ) from error


class Stager:
    """Copies this rank's part of the tensors to the CPU, time and again into the same memory.

    What all ranks hold (DDP's weights) is divided between them; pinned memory where the tensors are on a GPU.
    """

    def __init__(self) -> None:
        self._planned_for: list[str] = []
        self._plan: Any = None
        self._index: Any = None
        self._copies: dict[Any, Tensor] = {}

    def stage(self, tensors: Mapping[str, Tensor]) -> StagedTensors:
        """Copy the tensors; the ranks agree on a plan the first time and when other names come. Collective."""
        from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

        planner = DefaultSavePlanner(flatten_state_dict=False)
        planner.set_up_planner(dict(tensors), is_coordinator=dist.get_rank() == 0)
        if self._planned_for != list(tensors):
            self._agree(planner)
            self._planned_for = list(tensors)
        for item in self._plan.items:
            source: Any = planner.resolve_data(item)
            if item.index not in self._copies:
                self._copies[item.index] = host_memory_for(source)
            self._copies[item.index].copy_(source.detach(), non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return StagedTensors(self._plan, self._copies, self._index)

    def _agree(self, planner: Any) -> None:
        """Send every rank's wishes to rank 0 and back, with what others write as well taken out."""
        from torch.distributed.checkpoint.filesystem import FileSystemWriter

        world_size, first = dist.get_world_size(), dist.get_rank() == 0
        wishes: list[Any] | None = [None] * world_size if first else None
        dist.gather_object(planner.create_local_plan(), wishes)
        plans = None
        if wishes is not None:
            plans, self._index = planner.create_global_plan(wishes)
            plans = FileSystemWriter("").prepare_global_plan(plans)
        own: list[Any] = [None]
        dist.scatter_object_list(own, plans)
        self._plan, self._copies = planner.finish_plan(own[0]), {}


class StagedTensors:
    """What one rank writes: a plan, and its tensors on the CPU."""

    def __init__(self, plan: Any, copies: Mapping[Any, Tensor], index: Any) -> None:
        self._plan, self._copies, self._index = plan, copies, index
        self._written: list[Any] = []

    def write(self, directory: Path) -> list[Path]:
        """Write and sync this rank's file, and return it; raises OSError with its name."""
        from torch.distributed.checkpoint.filesystem import FileSystemWriter

        file = directory / f"{self._plan.storage_data.prefix}0.distcp"
        # Nothing to copy ahead from a GPU: the tensors have left it.
        writer = FileSystemWriter(directory, per_thread_copy_ahead=0)
        try:
            with naming(file):
                self._written = writer.write_data(self._plan, self).wait()  # type: ignore[arg-type]
        except OSError:
            # On a full disk others need the room now: the records, and that of this error.
            file.unlink(missing_ok=True)
            raise
        return [file]

    def resolve_data(self, item: Any) -> Tensor:
        """Return what DCP's writer asks for: the copy."""
        return self._copies[item.index]

    def gather_index(self, directory: Path) -> Callable[[], list[Path]]:
        """Tell rank 0 where every part lies; return what writes that down. Collective."""
        everywhere: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(self._written, everywhere)

        def write_index() -> list[Path]:
            from torch.distributed.checkpoint.filesystem import FileSystemWriter

            file = directory / _INDEX
            with naming(file):
                FileSystemWriter(directory).finish(self._index, everywhere or [])
            return [file]

        return write_index


def read_index(directory: Path) -> Any:
    """Return the index of a directory's tensors (DCP's Metadata) without running code from it.

    Raises UserError when the file holds anything else.
    """
    try:
        with open(directory / _INDEX, "rb") as file:
            return _IndexUnpickler(file).load()
    except (OSError, ValueError, EOFError, AttributeError, pickle.UnpicklingError) as error:
        raise UserError(f"cannot read {directory / _INDEX}: {error}") from error


def read_tensors_into(directory: Path, index: Any, tensors: Mapping[str, Tensor]) -> None:
    """Fill the given tensors, whole or sharded, in place: each rank reads its parts, without the others.

    The index must hold them all, in their shapes.
    """
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    planner, reader = DefaultLoadPlanner(flatten_state_dict=False), FileSystemReader(directory)
    planner.set_up_planner(dict(tensors), index, is_coordinator=False)
    reader.set_up_storage_reader(index, is_coordinator=False)
    plan = planner.finish_plan(planner.create_local_plan())
    reader.read_data(plan, planner).wait()


def _member(owner: Any, name: str) -> Any:
    """Take the place of ``getattr``, as which Python 3.11.0 to 3.11.3 pickle a member of an enumeration."""
    if isinstance(owner, type) and issubclass(owner, Enum) and name in owner.__members__:
        return owner[name]
    raise pickle.UnpicklingError(f"an attribute {name} has no place in an index of tensors")


class _IndexUnpickler(pickle.Unpickler):
    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)

    def find_class(self, module: str, name: str) -> Any:
        """Admit the types of an index, dtypes, and the path that it was written to."""
        if name in _INDEX_TYPES.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module.partition(".")[0] == "pathlib" and name == "PosixPath":
            return PurePosixPath
        if (module, name) == ("builtins", "getattr"):
            return _member
        raise pickle.UnpicklingError(f"{module}.{name} has no place in an index of tensors")
