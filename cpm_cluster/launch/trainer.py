"""trainer.json: the job as the trainer inside the container reads it (cpm_cluster/training/settings.py)."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from cpm_cluster.planner.flops import model_flops
from cpm_cluster.planner.job_setup import job_setup
from cpm_cluster.specs.job import Data, JobSpec, Lora
from cpm_cluster.specs.model import Model


def trainer_settings(spec: JobSpec, run_dir: str) -> dict[str, Any] | None:
    """None for the engine `command`, which brings its own program."""
    if spec.engine == "command" or spec.model is None:
        return None
    settings = {
        "format": 1,
        "output_dir": run_dir,
        "expected_world_size": spec.resources.world_size,
        "seed": spec.seed,
        "deterministic": spec.deterministic,
        "task": spec.task,
        "engine": spec.engine,
        "model": _model(spec.model, spec.model_name or spec.name),
        "init_from": spec.init_from,
        "tokenizer": spec.tokenizer,
        "method": _method(spec.method),
        "adapter": spec.method.init_from if spec.method else None,
        "data": asdict(spec.data or Data()),
        "training": asdict(spec.training),
        "evaluation": asdict(spec.evaluation),
        "generation": asdict(spec.generation) if spec.generation else None,
        "samples": asdict(spec.samples),
        "work": _work(spec),
    }
    return {key: _as_in_json(value) for key, value in settings.items()}


def _method(method: Lora | None) -> dict[str, Any]:
    """How it is tuned, whatever it begins with."""
    if method is None:
        return {"kind": "full"}
    return {"kind": "lora"} | {key: value for key, value in asdict(method).items() if key != "init_from"}


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


def _work(spec: JobSpec) -> dict[str, float | None]:
    """What model FLOP/s utilisation (MFU) is computed from; no GPU, no peak."""
    setup = job_setup(spec)
    peak = None
    if spec.gpu and spec.training.precision != "fp32":
        half = spec.gpu.peak_bf16_tflops if spec.training.precision == "bf16" else spec.gpu.peak_fp16_tflops
        peak = half * 1e12 if half else None
    return {
        "flops_per_token": model_flops(setup) if setup else None,
        "peak_flops_per_rank": peak,
    }


def _as_in_json(value: Any) -> Any:
    """Lists for tuples, so that a plan read back from its JSON is equal."""
    if isinstance(value, dict):
        return {key: _as_in_json(item) for key, item in value.items()}
    return [_as_in_json(item) for item in value] if isinstance(value, (list, tuple)) else value
