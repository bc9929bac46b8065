"""The torch engine's state on disk: whole tensors by parameter name, whatever the ranks or the sharding.

DDP and FSDP2 write the same files, so either continues what the other began. All functions are collective.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cpm_cluster.training.engines.fsdp import shard_like, whole
from cpm_cluster.training.errors import UserError
from cpm_cluster.training.files import write_atomically

_STEP = "step"


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return a dictionary of tensors on the CPU, without running code from the file.

    Raises UserError when the file cannot be read or holds anything else.
    """
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds here: OSError, UnpicklingError, RuntimeError, …
        raise UserError("cannot read weights from {}: {}".format(path, str(error).split("\n")[0])) from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise UserError(f"{path} is not a dictionary of tensors")
    return tensors


def save_trained(path: Path, parameters: Mapping[str, Tensor]) -> None:
    """Write the parameters by name, from rank 0."""
    weights = {name: _on_rank_0(parameter) for name, parameter in parameters.items()}
    if dist.get_rank() == 0:
        write_atomically(path, partial(torch.save, weights))


def load_trained(path: Path, parameters: Mapping[str, nn.Parameter]) -> None:
    """Copy weights into the parameters; raises UserError when the names or shapes differ."""
    weights = read_tensors(path)
    expected = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    if {name: tuple(weight.shape) for name, weight in weights.items()} != expected:
        raise UserError(f"{path} holds other parameters than this run trains")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(shard_like(weights[name], parameter))


def save_optimizer(path: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Write the optimizer's moments under ``NAME/MOMENT``, from rank 0."""
    moments = {
        f"{name}/{key}": _on_rank_0(value)
        for name, parameter in parameters.items()
        for key, value in optimizer.state[parameter].items()
    }
    if dist.get_rank() == 0:
        write_atomically(path, partial(torch.save, moments))


def load_optimizer(path: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Restore the moments; the step count stays whole and on the CPU, as AdamW keeps it."""
    for name_and_key, value in read_tensors(path).items():
        name, _, key = name_and_key.rpartition("/")
        parameter = parameters[name]
        optimizer.state[parameter][key] = value if key == _STEP else shard_like(value, parameter)


def save_generators(directory: Path, rank: int, device: torch.device) -> None:
    """Write this rank's random states."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    write_atomically(_generators(directory, rank), partial(torch.save, states))


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
