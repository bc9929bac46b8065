"""The BMTrain engine's state on disk: each rank its own parts, from which any other number of ranks takes its own.

``part-R.pt`` of rank R holds flat fp32 ranges of ``NAME/weight`` (the optimizer's copy), ``NAME/exp_avg`` and
``NAME/exp_avg_sq``; ``generators-R.pt`` its random states; ``parts.json`` how many ranks there were, the updates so
far, and the loss scale. Which elements a range holds follows from the number of ranks
(:meth:`cpm_cluster.training.engines.bmtrain_layers.Part.held_by`). No rank needs memory for more than its parts, and
one file of others where they were cut otherwise.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Callable, Iterable, Mapping

import torch
from torch import Tensor

from cpm_cluster.training.engines.bmtrain_layers import Part
from cpm_cluster.training.engines.bmtrain_optimizer import PartOptimizer
from cpm_cluster.training.engines.staging import host_memory_for
from cpm_cluster.training.errors import UserError
from cpm_cluster.training.files import write_atomically, write_json
from cpm_cluster.training.formats.tensor_files import read_tensors

_INDEX = "parts.json"
_KINDS = ("weight", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Index:
    """What the ranks have in common."""

    world_size: int
    updates: int
    loss_scale: float
    steps_since_last_scale: int


@dataclass(frozen=True)
class StagedParts:
    """See :class:`cpm_cluster.training.engines.StagedState`."""

    directory: Path
    rank: int
    index: Index
    tensors: dict[str, Tensor]
    generators: dict[str, Tensor]
    live: bool

    def write(self) -> list[Path]:
        """Write this rank's parts and random states, and from rank 0 the index."""
        parts, generators = self.directory / _parts(self.rank), self.directory / _generators(self.rank)
        write_atomically(parts, partial(torch.save, self.tensors))
        write_atomically(generators, partial(torch.save, self.generators))
        if self.rank > 0:
            return [parts, generators]
        write_json(self.directory / _INDEX, asdict(self.index))
        return [parts, generators, self.directory / _INDEX]

    def gather_index(self) -> Callable[[], list[Path]]:
        """Nothing is left to write: the index needs no other rank."""
        return list


class Stage:
    """Memory on the CPU that is used again by every copy, pinned for a GPU's sake."""

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}

    def copy(self, state: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Return copies that later changes do not reach."""
        for name, tensor in state:
            if name not in self._memory:
                self._memory[name] = host_memory_for(tensor)
            self._memory[name].copy_(tensor, non_blocking=True)
        torch.cuda.synchronize()
        return self._memory


def read_index(directory: Path) -> Index:
    """Return the index."""
    return Index(**json.loads((directory / _INDEX).read_text(encoding="utf-8")))


def load_parts(
    directory: Path, index: Index, parts: Mapping[str, Part], optimizer: PartOptimizer, rank: int, world_size: int
) -> None:
    """Restore this rank's parts from the files that hold elements of them.

    Raises UserError when the files hold other parameters. Files are read one after another.
    """
    found = {name: _Found(part, rank, world_size) for name, part in parts.items()}
    for writer in range(index.world_size):
        written = {name: part.held_by(writer, index.world_size) for name, part in parts.items()}
        if any(one.overlaps(written[name]) for name, one in found.items()):
            tensors = read_tensors(directory / _parts(writer))
            _check_names(tensors, parts, directory)
            for name, one in found.items():
                one.take(written[name], name, tensors)
    while found:
        name, one = found.popitem()
        optimizer.restore(name, one.state, index.loss_scale)


def _check_names(tensors: Mapping[str, Tensor], parts: Mapping[str, Part], directory: Path) -> None:
    if {name.rpartition("/")[0] for name in tensors} != set(parts):
        raise UserError(f"{directory} holds other parameters than this run trains")


def load_generators(directory: Path, rank: int) -> None:
    """Restore this rank's random states; a rank that the saved run did not have keeps its own."""
    path = directory / _generators(rank)
    if path.exists():
        states = read_tensors(path)
        torch.set_rng_state(states["cpu"])
        torch.cuda.set_rng_state(states["cuda"])


def random_states() -> dict[str, Tensor]:
    """Return this rank's random states."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state()}


class _Found:
    """What has been found of the elements that this rank holds of one parameter."""

    def __init__(self, part: Part, rank: int, world_size: int) -> None:
        self._held = part.held_by(rank, world_size)
        self.state = {kind: torch.empty(len(self._held)) for kind in _KINDS}

    def overlaps(self, written: range) -> bool:
        """Whether any of them are in what was written."""
        return max(self._held.start, written.start) < min(self._held.stop, written.stop)

    def take(self, written: range, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Copy those that are in what was written."""
        if not self.overlaps(written):
            return
        first, last = max(self._held.start, written.start), min(self._held.stop, written.stop)
        for kind, own in self.state.items():
            source = tensors[f"{name}/{kind}"]
            if source.numel() != len(written):
                raise UserError(f"the checkpoint cuts {name} otherwise; continue with the BMTrain that wrote it")
            own[first - self._held.start : last - self._held.start] = source[
                first - written.start : last - written.start
            ]


def _parts(rank: int) -> str:
    return f"part-{rank}.pt"


def _generators(rank: int) -> str:
    return f"generators-{rank}.pt"
