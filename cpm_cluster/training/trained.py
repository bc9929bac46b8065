"""What a run has trained so far: its ``weights/``, or one of its checkpoints, by whichever engine."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from cpm_cluster.training.checkpoint import damage_of
from cpm_cluster.training.errors import UserError
from cpm_cluster.training.formats.tensor_files import LazyTensors, Tensors, read_json_object, read_tensors
from cpm_cluster.training.layers import UninitialisedLayers
from cpm_cluster.training.lora import attach_lora
from cpm_cluster.training.model import CPM, check_weights
from cpm_cluster.training.settings import LoraTuning, ModelSettings, Settings

_OF_A_PARAMETER = "model."


class Trained(NamedTuple):
    """Trained parameters under their names (LoRA: the updates alone), after how many steps, and where they lie."""

    step: int
    tensors: Tensors
    source: Path


def read_trained(run: Path, settings: Settings, step: int | None) -> Trained:
    """Return what a run has trained: after that step, or else its final weights, or its newest whole checkpoint.

    Raises UserError when there is nothing of the kind, or when it is not of the run's model.
    """
    final = None if step is not None else _final(run, settings)
    trained = final or _from_checkpoint(run, settings, step)
    method = settings.method if isinstance(settings.method, LoraTuning) else None
    check_weights(shapes_of(settings.model, method), settings.model, trained.tensors, str(trained.source))
    return trained


def _final(run: Path, settings: Settings) -> Trained | None:
    """Weights of a run that finished; those of an attempt before the newest one are not final."""
    outcome = run / "outcome.json"
    path = run / "weights" / ("delta.pt" if isinstance(settings.method, LoraTuning) else "model.pt")
    if not outcome.is_file() or not path.is_file():
        return None
    ended = read_json_object(outcome)
    step = ended.get("step")
    return (
        Trained(step, read_tensors(path), path)
        if ended.get("outcome") == "finished" and isinstance(step, int)
        else None
    )


def _from_checkpoint(run: Path, settings: Settings, step: int | None) -> Trained:
    steps = _saved_steps(run)
    if step is not None and step not in steps:
        there = ", ".join(map(str, steps)) or "none"
        raise UserError(f"{run} has no checkpoint of step {step}; there are: {there}")
    damages = []
    for number in [step] if step is not None else reversed(steps):
        directory = run / "checkpoints" / f"step-{number:08d}"
        damage = damage_of(directory)
        if damage is None:
            read = _read_parts if settings.engine == "bmtrain" else _read_sharded
            return Trained(number, read(directory, settings), directory)
        damages.append(f"step {number}: {damage}")
    raise UserError(f"{run} has no weights yet, and no whole checkpoint{_listed(damages)}")


def _saved_steps(run: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in (run / "checkpoints").glob("step-????????"))


def _listed(damages: list[str]) -> str:
    return " ({})".format("; ".join(damages)) if damages else ""


def shapes_of(model: ModelSettings, lora: LoraTuning | None = None) -> dict[str, torch.Size]:
    """Return the shapes of all weights, or with LoRA of its factors."""
    empty = CPM(model, make=UninitialisedLayers(torch.float32))
    if lora is not None:
        attach_lora(empty, lora)
    return {name: parameter.shape for name, parameter in empty.named_parameters() if parameter.requires_grad}


def _read_sharded(directory: Path, settings: Settings) -> Tensors:
    """Read a checkpoint of the torch engine."""
    from cpm_cluster.training.engines.sharded_state import read_index, read_tensors_into

    index = read_index(directory)

    def read(name: str) -> Tensor:
        entry = index.state_dict_metadata[name]
        tensor = torch.empty(tuple(entry.size), dtype=entry.properties.dtype)
        read_tensors_into(directory, index, {name: tensor})
        return tensor

    names = [name for name in index.state_dict_metadata if name.startswith(_OF_A_PARAMETER)]
    return LazyTensors({name[len(_OF_A_PARAMETER) :]: partial(read, name) for name in names})


def _read_parts(directory: Path, settings: Settings) -> Tensors:
    """Read a checkpoint of BMTrain's: each file holds the next elements of every parameter."""
    from cpm_cluster.training.engines.bmtrain_state import read_index

    ranks = read_index(directory).world_size
    files = [read_tensors(directory / f"part-{rank}.pt") for rank in range(ranks)]

    def read(name: str, shape: torch.Size) -> Tensor:
        return torch.cat([file[name + "/weight"] for file in files]).view(shape)

    method = settings.method if isinstance(settings.method, LoraTuning) else None
    shapes = shapes_of(settings.model, method)
    return LazyTensors({name: partial(read, name, shape) for name, shape in shapes.items()})
