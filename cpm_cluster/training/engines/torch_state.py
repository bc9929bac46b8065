"""The torch engine's state on disk, whatever the ranks or the sharding: DDP and FSDP2 continue each other's.

Sharded over the ranks (:mod:`sharded_state`): ``model.NAME`` of every trained parameter, ``optimizer.NAME.MOMENT`` of
every moment. Beside it ``generators-rank-R.pt`` and, from rank 0, ``loss_scale.json``.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cpm_cluster.training.engines.fsdp import whole
from cpm_cluster.training.engines.sharded_state import StagedTensors, read_index, read_tensors_into
from cpm_cluster.training.errors import UserError
from cpm_cluster.training.files import write_atomically, write_json
from cpm_cluster.training.formats.tensor_files import read_tensors

_MODEL, _OPTIMIZER, _STEP = "model.", "optimizer.", "step"
_LOSS_SCALE = "loss_scale.json"


def save_trained(path: Path, parameters: Mapping[str, Tensor]) -> None:
    """Write the parameters by name, whole, from rank 0. Collective."""
    weights = {name: _on_rank_0(parameter) for name, parameter in parameters.items()}
    if dist.get_rank() == 0:
        write_atomically(path, partial(torch.save, weights))


class StagedTraining:
    """See :class:`cpm_cluster.training.engines.StagedState`."""

    live = False

    def __init__(
        self, directory: Path, rank: int, tensors: StagedTensors, device: torch.device, loss_scale: dict[str, float]
    ) -> None:
        """Take this rank's random states beside its tensors."""
        self._directory, self._rank, self._tensors, self._loss_scale = directory, rank, tensors, loss_scale
        self._generators = {"cpu": torch.get_rng_state()}
        if device.type == "cuda":
            self._generators["cuda"] = torch.cuda.get_rng_state(device)

    def write(self) -> list[Path]:
        """Write tensors, then random states, then the loss scale."""
        files = self._tensors.write(self._directory)
        files.append(_generators(self._directory, self._rank))
        write_atomically(files[-1], partial(torch.save, self._generators))
        if self._rank == 0:
            files.append(self._directory / _LOSS_SCALE)
            write_json(files[-1], self._loss_scale)
        return files

    def gather_index(self) -> Callable[[], list[Path]]:
        """Gather where the tensors lie."""
        return self._tensors.gather_index(self._directory)


def training_tensors(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return parameters and moments under their names on disk, without copying them."""
    tensors = {_MODEL + name: parameter.detach() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        for moment, value in sorted(optimizer.state[parameter].items()):
            tensors[f"{_OPTIMIZER}{name}.{moment}"] = value
    return tensors


def load_training_tensors(
    directory: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    """Fill the parameters and give the optimizer the moments that were saved, none where none were.

    Raises UserError when names or shapes of the parameters differ.
    """
    index = read_index(directory)
    saved = {name: tuple(entry.size) for name, entry in index.state_dict_metadata.items()}
    tensors = {_MODEL + name: parameter.detach() for name, parameter in parameters.items()}
    if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != {
        name: shape for name, shape in saved.items() if name.startswith(_MODEL)
    }:
        raise UserError(f"{directory} holds other parameters than this run trains")
    earlier = dict(optimizer.state)
    optimizer.state.clear()
    for name_on_disk in sorted(saved.keys() - tensors.keys()):
        name, _, moment = name_on_disk[len(_OPTIMIZER) :].rpartition(".")
        parameter = parameters[name]
        # AdamW keeps the number of steps whole and on the CPU, the moments like the parameter.
        value = earlier.get(parameter, {}).get(moment)
        if value is None:
            value = torch.zeros(()) if moment == _STEP else torch.zeros_like(parameter.detach())
        optimizer.state[parameter][moment] = tensors[name_on_disk] = value
    read_tensors_into(directory, index, tensors)


def load_loss_scale(directory: Path) -> dict[str, float]:
    """Return what was staged of the loss scale."""
    state: dict[str, float] = json.loads((directory / _LOSS_SCALE).read_text(encoding="utf-8"))
    return state


def load_generators(directory: Path, rank: int, device: torch.device) -> None:
    """Restore this rank's random states; a rank that the saved run did not have keeps its own."""
    path = _generators(directory, rank)
    if not path.exists():
        return
    states = read_tensors(path)
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def _generators(directory: Path, rank: int) -> Path:
    return directory / f"generators-rank-{rank}.pt"


def _on_rank_0(tensor: Tensor) -> Tensor:
    """Return the whole tensor on rank 0's CPU, an empty one elsewhere: only rank 0 may need the memory."""
    full = whole(tensor.detach())
    return full.cpu() if dist.get_rank() == 0 else torch.empty(0)
