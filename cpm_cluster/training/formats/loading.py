"""Base weights from wherever ``init_from`` points, and adapters: the loader goes by what it finds there."""

from __future__ import annotations

from pathlib import Path

from cpm_cluster.training.errors import UserError
from cpm_cluster.training.formats import cpm9g, huggingface, peft
from cpm_cluster.training.formats.opendelta import read_opendelta
from cpm_cluster.training.formats.tensor_files import Tensors
from cpm_cluster.training.model.lora import Delta, is_factor
from cpm_cluster.training.settings import ModelSettings


def read_base_weights(source: str, model: ModelSettings) -> Tensors:
    """Return weights under our names, read when they are asked for; names and shapes are for the model to check.

    ``source`` is a ``.pt`` file of CPM-9G, a folder of several, or a folder of Hugging Face's Llama layout. Raises
    UserError when it is nothing of these, or cannot be read.
    """
    path = Path(source)
    weights = _read(path, model)
    if any(is_factor(name) for name in weights):
        raise UserError(f"{path} holds LoRA updates, no base weights: fold them into theirs with cpm export --merge")
    return weights


def read_adapter(path: Path) -> Delta:
    """Return LoRA updates from elsewhere: a ``-delta.pt`` of CPM-9G (see :mod:`opendelta`), or PEFT's.

    PEFT's are named by their folder, or by the ``.safetensors`` in it. Raises UserError when it is neither, or cannot
    be read.
    """
    if path.suffix == ".safetensors" and path.name != peft.WEIGHTS:
        raise UserError(f"{path}: name the folder instead, in which {peft.CONFIG} and {peft.WEIGHTS} lie")
    if not path.is_dir() and path.suffix != ".safetensors":
        return read_opendelta(path)
    folder = path if path.is_dir() else path.parent
    if (folder / peft.CONFIG).is_file():
        return peft.read_peft(folder)
    raise UserError(f"{path} is no adapter of PEFT: {peft.CONFIG} is missing")


def _read(path: Path, model: ModelSettings) -> Tensors:
    if path.suffix == ".safetensors" and path.is_file():
        raise UserError(f"{path}: name the folder instead, in which {huggingface.CONFIG} lies, too")
    if not path.is_dir():
        return cpm9g.read_cpm9g(path)
    if huggingface.has_weights(path):
        return huggingface.read_huggingface(path, model)
    if (path / peft.CONFIG).is_file():
        raise UserError(f"{path} holds an adapter of PEFT, no base weights")
    if cpm9g.weight_files(path):
        return cpm9g.read_cpm9g(path)
    raise UserError(
        f"{path} holds no weights: neither model.safetensors or its index, nor a .pt file of CPM-9G"
        "; of a run, name weights/model.pt in it"
    )
