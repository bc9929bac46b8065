"""Reading ``trainer.json``: unknown, missing, ill-typed and out-of-range keys, reported in one error."""

from __future__ import annotations

import json
import math
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Sequence, Tuple, Union, get_args, get_origin, get_type_hints

from cpm_cluster.training.errors import UserError
from cpm_cluster.training.model.lora import LORA_TARGETS
from cpm_cluster.training.settings import LoraTuning, Settings, SourceSettings, TrainingSettings

# What a value becomes when it is unusable; the problem has been noted already.
_INVALID = object()
# Whether something holds, and what to say where it does not.
Rule = Tuple[bool, str]
# Not Literal[1] in Settings: in Python 3.8 that is Literal[True] where a library has made one before (bpo-42345).
_FORMAT = 1
_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def read_settings(path: Path) -> Settings:
    """Return the settings in a JSON file.

    Raises UserError when the file cannot be read, is not JSON, or :func:`parse_settings` refuses it.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    return parse_settings(raw)


def parse_settings(raw: object) -> Settings:
    """Return the settings in a parsed JSON value; raises UserError that lists every problem in it."""
    problems: list[str] = []
    settings = _parse(Settings, raw, "", problems)
    if isinstance(settings, Settings):
        problems.extend(_out_of_range(settings))
    if problems:
        raise UserError("the settings have {} problem(s): {}".format(len(problems), "; ".join(problems)))
    assert isinstance(settings, Settings)
    return settings


def parse_part(expected: Any, value: object, where: str) -> Any:
    """Return one part of the settings, of a type of theirs; raises UserError that lists every problem in it."""
    problems: list[str] = []
    part = _parse(expected, value, where, problems)
    if problems:
        raise UserError("; ".join(problems))
    return part


def _parse(expected: Any, value: object, where: str, problems: list[str]) -> object:
    origin = get_origin(expected)
    if is_dataclass(expected):
        return _parse_object(expected, value, where, problems)
    if origin is Literal:
        return _parse_choice(get_args(expected), value, where, problems)
    if origin is Union:
        return _parse_union(get_args(expected), value, where, problems)
    if origin is tuple:
        return _parse_list(get_args(expected), value, where, problems)
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not expected or (isinstance(value, float) and not math.isfinite(value)):
        problems.append(f"{where}: expected {_NAMES[expected]}, got {json.dumps(value)}")
        return _INVALID
    return value


def _parse_object(expected: Any, value: object, where: str, problems: list[str]) -> object:
    if not isinstance(value, dict):
        problems.append("{}: expected an object, got {}".format(where or "the file", json.dumps(value)))
        return _INVALID
    types = get_type_hints(expected)
    names = [field.name for field in fields(expected)]
    prefix = where + "." if where else ""
    problems.extend(f"{prefix}{key}: unknown key" for key in value if key not in names)
    problems.extend(f"{prefix}{name}: missing" for name in names if name not in value)
    parsed = {name: _parse(types[name], value[name], prefix + name, problems) for name in names if name in value}
    if len(parsed) < len(names) or any(item is _INVALID for item in parsed.values()):
        return _INVALID
    return expected(**parsed)


def _parse_choice(choices: tuple[Any, ...], value: object, where: str, problems: list[str]) -> object:
    if any(value == choice and type(value) is type(choice) for choice in choices):
        return value
    allowed = " or ".join(json.dumps(choice) for choice in choices)
    problems.append(f"{where}: expected {allowed}, got {json.dumps(value)}")
    return _INVALID


def _parse_union(members: tuple[Any, ...], value: object, where: str, problems: list[str]) -> object:
    """Parse ``Optional[X]``, or the union of dataclasses that their ``kind`` tells apart."""
    if type(None) in members:
        (other,) = [member for member in members if member is not type(None)]
        return None if value is None else _parse(other, value, where, problems)
    kinds = {get_args(get_type_hints(member)["kind"])[0]: member for member in members}
    if not isinstance(value, dict) or value.get("kind") not in kinds:
        allowed = " or ".join(f'{{"kind": "{kind}"}}' for kind in sorted(kinds))
        problems.append(f"{where}: expected an object with {allowed}, got {json.dumps(value)}")
        return _INVALID
    return _parse(kinds[value["kind"]], value, where, problems)


def _parse_list(members: tuple[Any, ...], value: object, where: str, problems: list[str]) -> object:
    if not isinstance(value, list):
        problems.append(f"{where}: expected a list, got {json.dumps(value)}")
        return _INVALID
    if members[-1] is Ellipsis:
        members = (members[0],) * len(value)
    if len(members) != len(value):
        problems.append(f"{where}: expected {len(members)} values, got {len(value)}")
        return _INVALID
    items = [
        _parse(member, item, f"{where}[{index}]", problems) for index, (member, item) in enumerate(zip(members, value))
    ]
    return _INVALID if any(item is _INVALID for item in items) else tuple(items)


def _out_of_range(settings: Settings) -> list[str]:
    """Return what is well-typed but cannot be trained with."""
    counts, model = _counts(settings), settings.model
    rules = [(value >= 1, f"{key}: must be at least 1") for key, value in counts.items()]
    rules += [
        (settings.format == _FORMAT, f"format: expected {_FORMAT}, got {settings.format}"),
        (Path(settings.output_dir).is_absolute(), "output_dir: must be an absolute path"),
        (model.head_dim % 2 == 0, "model.head_dim: must be even (rotary pairs)"),
        (model.kv_heads < 1 or model.heads % model.kv_heads == 0, "model.kv_heads: must divide model.heads"),
        *_task_rules(settings),
        *_training_rules(settings.training),
        (settings.samples.max_tokens >= 0, "samples.max_tokens: must not be negative"),
        (settings.samples.temperature >= 0, "samples.temperature: must not be negative"),
    ]
    problems = [message for holds, message in rules if not holds]
    if isinstance(settings.method, LoraTuning):
        problems.extend(_lora_problems(settings.method))
    return problems


def _counts(settings: Settings) -> dict[str, int]:
    """Return what must be at least 1."""
    model, training = settings.model, settings.training
    return {
        "expected_world_size": settings.expected_world_size,
        "model.layers": model.layers,
        "model.hidden": model.hidden,
        "model.heads": model.heads,
        "model.kv_heads": model.kv_heads,
        "model.head_dim": model.head_dim,
        "model.ffn": model.ffn,
        "model.vocab": model.vocab,
        "training.seq_len": training.seq_len,
        "training.micro_batch": training.micro_batch,
        "training.grad_accum": training.grad_accum,
        "training.steps": training.steps,
        "training.log_every": training.log_every,
        "training.checkpoint.every": training.checkpoint.every,
        "training.checkpoint.keep": training.checkpoint.keep,
        "training.guard.window": training.guard.window,
        "training.guard.limit": training.guard.limit,
    }


def _training_rules(training: TrainingSettings) -> list[Rule]:
    return [
        (0 <= training.zero_stage <= 3, "training.zero_stage: must be between 0 and 3"),
        (training.guard.spike_deviations > 0, "training.guard.spike_deviations: must be positive"),
        (training.lr > 0, "training.lr: must be positive"),
        (0 <= training.min_lr_ratio <= 1, "training.min_lr_ratio: must be between 0 and 1"),
        (0 <= training.warmup_steps <= training.steps, "training.warmup_steps: must be between 0 and steps"),
        (training.weight_decay >= 0, "training.weight_decay: must not be negative"),
        (all(0 <= beta < 1 for beta in training.betas), "training.betas: must be in [0, 1)"),
        (training.clip_grad_norm >= 0, "training.clip_grad_norm: must not be negative"),
        (training.eval_every >= 0, "training.eval_every: must not be negative"),
    ]


def _task_rules(settings: Settings) -> list[Rule]:
    """Return the rules of what a task works on."""
    rules = [
        (
            bool(settings.data.train) or settings.task in ("evaluate", "generate"),
            "data.train: must name at least one file",
        ),
        (_weights_agree(settings.data.train), "data.train: all sources have a weight above 0, or none has one"),
        (
            all(source.weight is None for source in settings.data.eval),
            "data.eval: no source has a weight: evaluation takes every sample once",
        ),
        (settings.evaluation.shots >= 0, "evaluation.shots: must not be negative"),
        (
            bool(settings.data.eval or settings.evaluation.choices) or settings.task != "evaluate",
            "task: evaluate needs data.eval or evaluation.choices",
        ),
        (settings.generation is not None or settings.task != "generate", "generation: task generate needs it"),
        (settings.adapter is None or isinstance(settings.method, LoraTuning), "adapter: needs method lora"),
    ]
    if settings.generation is not None:
        generation = settings.generation
        rules += [
            (generation.batch >= 1, "generation.batch: must be at least 1"),
            (generation.max_tokens >= 1, "generation.max_tokens: must be at least 1"),
            (generation.temperature >= 0, "generation.temperature: must not be negative"),
            (0 < generation.top_p <= 1, "generation.top_p: must be above 0, and at most 1"),
        ]
    return rules


def _weights_agree(sources: Sequence[SourceSettings]) -> bool:
    weights = [source.weight for source in sources if source.weight is not None]
    return len(weights) in (0, len(sources)) and all(weight > 0 for weight in weights)


def _lora_problems(lora: LoraTuning) -> list[str]:
    unknown = [target for target in lora.targets if target not in LORA_TARGETS]
    rules = [
        (lora.rank >= 1, "method.rank: must be at least 1"),
        (0 <= lora.dropout < 1, "method.dropout: must be in [0, 1)"),
        (bool(lora.targets), "method.targets: must name at least one layer"),
        (not unknown, "method.targets: {} not among {}".format(", ".join(unknown), ", ".join(LORA_TARGETS))),
    ]
    return [message for holds, message in rules if not holds]
