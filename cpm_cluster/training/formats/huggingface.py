"""Folders of Hugging Face's Llama layout: ``config.json`` and weights in one file, or in several with an index.

CPM-9G's decoder is Llama's under other names. transformers 5 writes the rotary base as ``rope_parameters.rope_theta``
and the number type as ``dtype``, earlier versions as ``rope_theta`` and ``torch_dtype``; 5 reads both.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any, Callable, Mapping

import torch
from torch import Tensor

from cpm_cluster.training.errors import UserError
from cpm_cluster.training.files import write_json
from cpm_cluster.training.formats.tensor_files import (
    LazyTensors,
    Tensors,
    open_files,
    read_json_object,
    write_safetensors,
)
from cpm_cluster.training.settings import ModelSettings

CONFIG = "config.json"
# The first of these that a folder has holds its weights.
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_FILES = ("model.safetensors", "pytorch_model.bin")
SHARD_BYTES = 5_000_000_000

_OF_THE_MODEL = {
    "input_embedding": "model.embed_tokens",
    "encoder.output_layernorm": "model.norm",
    "lm_head": "lm_head",
}
_OF_A_LAYER = {
    "self_att.layernorm_before_attention": "input_layernorm",
    "self_att.self_attention.project_q": "self_attn.q_proj",
    "self_att.self_attention.project_k": "self_attn.k_proj",
    "self_att.self_attention.project_v": "self_attn.v_proj",
    "self_att.self_attention.attention_out": "self_attn.o_proj",
    "ffn.layernorm_before_ffn": "post_attention_layernorm",
    "ffn.ffn.w_in.w_0": "mlp.gate_proj",
    "ffn.ffn.w_in.w_1": "mlp.up_proj",
    "ffn.ffn.w_out": "mlp.down_proj",
}
_FROM_MODEL = {theirs: ours for ours, theirs in _OF_THE_MODEL.items()}
_FROM_LAYER = {theirs: ours for ours, theirs in _OF_A_LAYER.items()}


def their_module(name: str) -> str:
    """Return Llama's name of a module of ours: ``encoder.layers.3.ffn.ffn.w_out`` is ``model.layers.3.mlp.down_proj``.

    Raises KeyError for any other name.
    """
    layer = re.match(r"encoder\.layers\.(\d+)\.(.+)$", name)
    return f"model.layers.{layer.group(1)}.{_OF_A_LAYER[layer.group(2)]}" if layer else _OF_THE_MODEL[name]


def our_module(name: str) -> str:
    """Return our name of a module of Llama's; raises KeyError for any other name."""
    layer = re.match(r"model\.layers\.(\d+)\.(.+)$", name)
    return f"encoder.layers.{layer.group(1)}.{_FROM_LAYER[layer.group(2)]}" if layer else _FROM_MODEL[name]


def has_weights(folder: Path) -> bool:
    """Return whether a folder holds weights under one of the usual names."""
    return any((folder / name).is_file() for name in (*_INDEXES, *_FILES))


def read_huggingface(folder: Path, model: ModelSettings) -> LazyTensors:
    """Return a folder's weights under our names.

    Raises UserError when they cannot be read, or when ``config.json`` describes another model; names and shapes are
    for the model to check.
    """
    _check_config(folder / CONFIG, model)
    tensors = open_files(_weight_files(folder))
    # Earlier versions saved the rotary frequencies, and tied heads twice.
    needless = {"lm_head.weight"} if model.tied_embeddings else set()
    wanted = [name for name in tensors if name not in needless and not name.endswith("rotary_emb.inv_freq")]
    return LazyTensors({_our_name(name): partial(tensors.__getitem__, name) for name in wanted})


def _our_name(name: str) -> str:
    """Return our name of a weight, or an unknown weight's own name, by which the error will call it."""
    module, _, kind = name.rpartition(".")
    try:
        return f"{our_module(module)}.{kind}"
    except KeyError:
        return name


def _weight_files(folder: Path) -> list[Path]:
    index = next((folder / name for name in _INDEXES if (folder / name).is_file()), None)
    if index is None:
        return [next(folder / name for name in _FILES if (folder / name).is_file())]
    placed = read_json_object(index).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise UserError(f"{index} has no weight_map")
    names = sorted({str(name) for name in placed.values()})
    strange = next((name for name in names if Path(name).name != name), None)
    if strange is not None:
        raise UserError(f"{index}: {strange} is not the name of a file in this folder")
    files = [folder / name for name in names]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(f"{folder} lacks {len(missing)} file(s) of {index.name}, among them {missing[0]}")
    return files


def _check_config(path: Path, model: ModelSettings) -> None:
    """Compare what the shapes of weights do not tell, and what our decoder cannot do."""
    config = read_json_object(path)
    if config.get("model_type") != "llama":
        raise UserError(f"{path} is of model_type {config.get('model_type')}; the trainer reads llama")
    rope: Any = config.get("rope_parameters") or config.get("rope_scaling") or {}
    heads: Any = config.get("num_attention_heads", 32)
    hidden: Any = config.get("hidden_size", 4096)
    said = {
        "vocab_size": config.get("vocab_size", 32000),
        "hidden_size": hidden,
        "intermediate_size": config.get("intermediate_size", 11008),
        "num_hidden_layers": config.get("num_hidden_layers", 32),
        "num_attention_heads": heads,
        "num_key_value_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or hidden // heads,
        "rms_norm_eps": config.get("rms_norm_eps", 1e-6),
        "rope_theta": rope.get("rope_theta", config.get("rope_theta", 10000.0)),
        "tie_word_embeddings": config.get("tie_word_embeddings", False),
        "rope_type": rope.get("rope_type", rope.get("type", "default")),
        "hidden_act": config.get("hidden_act", "silu"),
        "attention_bias": config.get("attention_bias", False),
        "mlp_bias": config.get("mlp_bias", False),
    }
    expected = {**_dimensions(model), "rope_type": "default", "attention_bias": False, "mlp_bias": False}
    wrong = [f"{key} is {said[key]} instead of {wanted}" for key, wanted in expected.items() if said[key] != wanted]
    if wrong:
        raise UserError("{} does not fit model {}: {}".format(path, model.name, "; ".join(wrong)))


def _dimensions(model: ModelSettings) -> dict[str, Any]:
    return {
        "vocab_size": model.vocab,
        "hidden_size": model.hidden,
        "intermediate_size": model.ffn,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "tie_word_embeddings": model.tied_embeddings,
        "hidden_act": "silu",
    }


def write_config(
    folder: Path, model: ModelSettings, dtype: torch.dtype, positions: int, bos: int | None, eos: int | None
) -> None:
    """Write ``config.json``; ``positions`` is the longest text that the model has seen, in tokens."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **_dimensions(model),
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": positions,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "torch_dtype": str(dtype).split(".")[-1],
    }
    write_json(folder / CONFIG, config)


def write_weights(
    folder: Path, tensors: Tensors, note: Callable[[str], None], shard_bytes: int = SHARD_BYTES
) -> list[Path]:
    """Write weights (our names) file by file, so that one file's are in memory at a time; ``note`` hears of each."""
    shards: list[Mapping[str, int]] = []
    shard: dict[str, Tensor] = {}
    size = 0

    def finish_shard() -> None:
        write_safetensors(folder / _unnumbered(len(shards)), shard)
        shards.append({name: tensor.numel() * tensor.element_size() for name, tensor in shard.items()})
        shard.clear()

    for name in tensors:
        tensor = tensors[name]
        bytes_more = tensor.numel() * tensor.element_size()
        if shard and size + bytes_more > shard_bytes:
            finish_shard()
            size = 0
        module, _, kind = name.rpartition(".")
        shard[f"{their_module(module)}.{kind}"] = tensor
        size += bytes_more
        note(name)
    finish_shard()
    return _number(folder, shards)


def _number(folder: Path, shards: list[Mapping[str, int]]) -> list[Path]:
    """Give the files the names that tell how many there are, and write the index."""
    if len(shards) == 1:
        return [(folder / _unnumbered(0)).replace(folder / _FILES[0])]
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    files = [(folder / _unnumbered(number)).replace(folder / name) for number, name in enumerate(names)]
    total = sum(sum(sizes.values()) for sizes in shards)
    placed = {weight: name for name, sizes in zip(names, shards) for weight in sizes}
    write_json(folder / _INDEXES[0], {"metadata": {"total_size": total}, "weight_map": placed})
    return files


def _unnumbered(number: int) -> str:
    return f"shard-{number}.safetensors"
