"""trainer.json: the job as the trainer inside the container reads it (cpm_cluster/training/settings.py)."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from cpm_cluster.specs.job import JobSpec, Training
from cpm_cluster.specs.model import Model


def trainer_settings(spec: JobSpec, run_dir: str) -> dict[str, Any] | None:
    """None for the engine `command`, which brings its own program."""
    if spec.engine == "command" or spec.model is None or spec.data is None:
        return None
    settings = {
        "format": 1,
        "output_dir": run_dir,
        "expected_world_size": spec.resources.world_size,
        "seed": spec.seed,
        "deterministic": spec.deterministic,
        "engine": spec.engine,
        "parallel": "ddp" if spec.training.zero_stage == 0 else "fsdp",
        "model": _model(spec.model, spec.model_name or spec.name),
        "init_from": spec.init_from,
        "tokenizer": spec.tokenizer,
        "method": {"kind": "lora", **asdict(spec.method)} if spec.method else {"kind": "full"},
        "data": {"train": list(spec.data.train), "eval": list(spec.data.eval)},
        "training": _training(spec.training),
        "samples": asdict(spec.samples),
    }
    return {key: _as_in_json(value) for key, value in settings.items()}


def _model(model: Model, name: str) -> dict[str, Any]:
    return {
        "name": name,
        "layers": model.layers,
        "hidden": model.hidden,
        "heads": model.heads,
        "kv_heads": model.key_value_heads,
        "head_dim": model.size_of_head,
        "ffn": model.ffn,
        "vocab": model.vocab,
        "norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "tied_embeddings": model.tied_embeddings,
    }


def _training(training: Training) -> dict[str, Any]:
    settings = asdict(training)
    for decided_elsewhere in ("attention", "zero_stage", "offload_optimizer"):
        del settings[decided_elsewhere]
    return settings


def _as_in_json(value: Any) -> Any:
    """Lists for tuples, so that a plan read back from its JSON is equal."""
    if isinstance(value, dict):
        return {key: _as_in_json(item) for key, item in value.items()}
    return [_as_in_json(item) for item in value] if isinstance(value, (list, tuple)) else value
