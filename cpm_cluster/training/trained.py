"""What a run has trained so far: its ``weights/``, or one of its checkpoints, by whichever engine."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cpm_cluster.training.checkpoint import damage_of
from cpm_cluster.training.errors import UserError
from cpm_cluster.training.formats.tensor_files import LazyTensors, Tensors, read_json_object, read_tensors
from cpm_cluster.training.model.decoder import CPM, check_weights
from cpm_cluster.training.model.layers import UninitialisedLayers
from cpm_cluster.training.model.lora import attach_lora
from cpm_cluster.training.settings import LoraTuning, MethodSettings, ModelSettings
from cpm_cluster.training.settings_file import parse_part

_OF_A_PARAMETER = "model."


class Recipe(NamedTuple):
    """What ``trainer.json`` says of the model: no more than has always stood there, so that old runs can be read."""

    model: ModelSettings
    lora: LoraTuning | None
    engine: str
    task: str
    init_from: str | None
    tokenizer: str
    seq_len: int


def read_recipe(run: Path) -> Recipe:
    """Return how a run trains; raises UserError when its settings cannot be read."""
    path = run / "trainer.json"
    raw: Any = read_json_object(path)
    try:
        model = parse_part(ModelSettings, raw["model"], "model")
        if Path(model.name).name != model.name:
            raise UserError(f"model.name {model.name} cannot be the name of a file")
        method = parse_part(MethodSettings, raw["method"], "method")
        return Recipe(
            model,
            method if isinstance(method, LoraTuning) else None,
            raw["engine"],
            raw.get("task", "finetune"),
            raw["init_from"],
            raw["tokenizer"],
            raw["training"]["seq_len"],
        )
    except (KeyError, TypeError, UserError) as error:
        raise UserError(f"{path} is not of this trainer: {error}") from error


class Trained(NamedTuple):
    """Trained parameters under their names (LoRA: the updates alone), where they lie, and after how many steps.

    The steps of what was not trained here are None.
    """

    step: int | None
    tensors: Tensors
    source: Path


def read_trained(run: Path, recipe: Recipe, step: int | None) -> Trained:
    """Return what a run has trained: after that step, or else its final weights, or its newest whole checkpoint.

    Raises UserError when there is nothing of the kind, or when it is not of the run's model.
    """
    final = None if step is not None else read_final(run, recipe)
    trained = final or _from_checkpoint(run, recipe, step)
    check_weights(shapes_of(recipe.model, recipe.lora), recipe.model, trained.tensors, str(trained.source))
    return trained


def read_final(run: Path, recipe: Recipe) -> Trained | None:
    """Return the weights of a run that finished; those of an attempt before the newest one are not final."""
    outcome = run / "outcome.json"
    path = run / "weights" / ("delta.pt" if recipe.lora else "model.pt")
    if not outcome.is_file() or not path.is_file():
        return None
    ended = read_json_object(outcome)
    step = ended.get("step")
    return (
        Trained(step, read_tensors(path), path)
        if ended.get("outcome") == "finished" and isinstance(step, int)
        else None
    )


def _from_checkpoint(run: Path, recipe: Recipe, step: int | None) -> Trained:
    steps = _saved_steps(run)
    if step is not None and step not in steps:
        there = ", ".join(map(str, steps)) or "none"
        raise UserError(f"{run} has no checkpoint of step {step}; there are: {there}")
    damages = []
    for number in [step] if step is not None else reversed(steps):
        directory = run / "checkpoints" / f"step-{number:08d}"
        damage = damage_of(directory)
        if damage is None:
            read = _read_parts if recipe.engine == "bmtrain" else _read_sharded
            return Trained(number, read(directory, recipe), directory)
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


def _read_sharded(directory: Path, recipe: Recipe) -> Tensors:
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


def _read_parts(directory: Path, recipe: Recipe) -> Tensors:
    """Read a checkpoint of BMTrain's: each file holds the next elements of every parameter."""
    from cpm_cluster.training.engines.bmtrain_state import read_index

    ranks = read_index(directory).world_size
    files = [read_tensors(directory / f"part-{rank}.pt") for rank in range(ranks)]

    def read(name: str, shape: torch.Size) -> Tensor:
        return torch.cat([file[name + "/weight"] for file in files]).view(shape)

    shapes = shapes_of(recipe.model, recipe.lora)
    return LazyTensors({name: partial(read, name, shape) for name, shape in shapes.items()})
