"""The LoRA updates that a task begins with: what trained here earlier, or came from elsewhere (``adapter``).

They are in factors A and B, which the model's layers take as they are; nothing is folded into the base.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Iterator, Mapping

import torch

from cpm_cluster.training.errors import UserError
from cpm_cluster.training.formats.loading import read_adapter
from cpm_cluster.training.formats.tensor_files import Tensors
from cpm_cluster.training.model.decoder import check_weights
from cpm_cluster.training.model.lora import Delta, is_factor
from cpm_cluster.training.settings import LoraTuning, Settings
from cpm_cluster.training.trained import read_final, read_recipe


def open_adapter(settings: Settings, shapes: Mapping[str, torch.Size]) -> Tensors | None:
    """Return the factors under their names, None where no adapter is named; ``shapes`` are of the whole model.

    Raises UserError naming the key of the job file that the adapter does not agree with: its rank, alpha and targets
    are the method's, and it has a factor of the right shape for each of the model's.
    """
    if settings.adapter is None or not isinstance(settings.method, LoraTuning):
        return None
    path = Path(settings.adapter)
    own = {name: shape for name, shape in shapes.items() if is_factor(name)}
    try:
        delta = _read(path)
        wrong = list(_differences(settings.method, delta, path))
        if not wrong:
            check_weights(own, settings.model, delta.factors, str(path))
    except UserError as error:
        raise UserError(f"method.lora.init_from: {error}") from error
    if wrong:
        raise UserError("{}; write what the adapter has".format("; ".join(wrong)))
    return delta.factors


def _read(path: Path) -> Delta:
    """Read a run's final updates, by its folder or as their file: ``trainer.json`` knows their alpha; or any other."""
    of_a_run = path.parent.parent if path.parts[-2:] == ("weights", "delta.pt") else path
    if not (of_a_run / "trainer.json").is_file():
        return read_adapter(path)
    recipe = read_recipe(of_a_run)
    if recipe.lora is None:
        raise UserError(f"{of_a_run} has trained all weights, no updates: name its weights in init_from instead")
    trained = read_final(of_a_run, recipe)
    if trained is None:
        raise UserError(
            f"{of_a_run} has not finished, or not as a training; of a checkpoint name what"
            " cpm export --format lora makes of it"
        )
    return Delta(trained.tensors, recipe.lora.alpha)


def _differences(method: LoraTuning, delta: Delta, path: Path) -> Iterator[str]:
    """Updates of another rank would be other layers; those of another alpha would weigh more, or less."""
    if delta.rank != method.rank:
        yield f"method.lora.rank is {method.rank}, but {delta.rank} in {path}"
    if set(delta.targets) != set(method.targets):
        here, there = (", ".join(sorted(targets)) for targets in (method.targets, delta.targets))
        yield f"method.lora.targets are {here}, but {there} in {path}"
    # The message has six digits, as people would copy them; rsLoRA's alpha has more.
    if not math.isclose(delta.alpha, method.alpha, rel_tol=1e-5):
        where = f"is CPM-9G's, and {path} says none" if delta.alpha_is_assumed else f"in {path}"
        yield f"method.lora.alpha is {method.alpha:g}, but {delta.alpha:g} {where}"
