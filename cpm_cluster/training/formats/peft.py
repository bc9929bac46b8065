"""LoRA adapters as PEFT keeps them for Llama: ``adapter_config.json`` beside ``adapter_model.safetensors``."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any, Callable, Mapping

from torch import Tensor

from cpm_cluster.training.errors import UserError
from cpm_cluster.training.files import write_json
from cpm_cluster.training.formats.huggingface import our_module, their_module
from cpm_cluster.training.formats.tensor_files import LazyTensors, open_files, read_json_object, write_safetensors
from cpm_cluster.training.model.lora import FACTOR_A, FACTOR_B, Delta, split_factor

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_THEIR_FACTOR = {FACTOR_A: ".lora_A.weight", FACTOR_B: ".lora_B.weight"}
# What our layers do not have, and how PEFT says that an adapter has not got it either.
_WITHOUT: dict[str, Any] = {
    "use_dora": False,
    "use_qalora": False,
    "fan_in_fan_out": False,
    "lora_bias": False,
    "bias": "none",
    "modules_to_save": None,
    "trainable_token_indices": None,
    "alpha_pattern": {},
}
# Likewise of newer versions; not written, because earlier ones refuse keys that they do not know.
_WITHOUT_NEWER = dict.fromkeys(
    ("alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config", "use_bdlora")
)
# Begun in any other way (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) the updates belong to a base that PEFT changes, too.
_LEAVE_THE_BASE = (True, False, None, "gaussian", "orthogonal", "eva", "mica")


def write_peft(folder: Path, delta: Delta, dropout: float, base: str | None, note: Callable[[str], None]) -> None:
    """Write an adapter; ``base`` is the folder of the model that it belongs to, where that is known."""
    tensors: dict[str, Tensor] = {}
    targets = set()
    for name in delta.factors:
        layer, factor = split_factor(name)
        module = their_module(layer)
        targets.add(module.rpartition(".")[2])
        tensors[_PREFIX + module + _THEIR_FACTOR[factor]] = delta.factors[name]
        note(name)
    write_safetensors(folder / WEIGHTS, tensors)
    alpha = int(delta.alpha) if delta.alpha == int(delta.alpha) else delta.alpha
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": delta.rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": sorted(targets),
        "use_rslora": False,
        "init_lora_weights": True,
        **_WITHOUT,
        "rank_pattern": {},
    }
    write_json(folder / CONFIG, config)


def read_peft(folder: Path) -> Delta:
    """Return an adapter with our names.

    Raises UserError when it cannot be read, or is more than the updates of linear layers that our LoRA has.
    """
    path = folder / CONFIG
    config = read_json_object(path)
    if config.get("peft_type") != "LORA":
        raise UserError(f"{path} is of peft_type {config.get('peft_type')}; only LORA can be read")
    _require_plain(config, path)
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, (int, float)):
        raise UserError(f"{path} does not say r and lora_alpha")
    if config.get("use_rslora"):
        alpha = alpha * math.sqrt(rank)  # it scales by alpha / √r
    tensors = open_files([folder / WEIGHTS])
    names = {_our_name(name, folder): name for name in tensors}
    return Delta(LazyTensors({ours: partial(tensors.__getitem__, name) for ours, name in names.items()}), float(alpha))


def _require_plain(config: Mapping[str, object], path: Path) -> None:
    absent = {**_WITHOUT, **_WITHOUT_NEWER}
    strange = [key for key, value in absent.items() if config.get(key, value) not in (value, None)]
    if config.get("use_rslora") and config.get("rank_pattern"):
        strange.append("use_rslora with rank_pattern")  # the scale of a layer would depend on its rank
    if strange:
        raise UserError("{} has {}, which our LoRA has not".format(path, ", ".join(strange)))
    begun = config.get("init_lora_weights", True)
    if begun not in _LEAVE_THE_BASE:
        raise UserError(
            f"{path} has init_lora_weights: {begun}, which changes the base weights, too; save it anew with PEFT's"
            " save_pretrained(…, path_initial_model_for_weight_conversion=…)"
        )


def _our_name(name: str, folder: Path) -> str:
    for ours, theirs in _THEIR_FACTOR.items():
        if name.startswith(_PREFIX) and name.endswith(theirs):
            try:
                return our_module(name[len(_PREFIX) : -len(theirs)]) + ours
            except KeyError:
                break
    raise UserError(f"{folder / WEIGHTS}: {name} is no update of a layer of Llama")
