"""A tiny model, and runs of it on loopback."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch_here import require_torch_for

from cpm_cluster.training.data.corpus import Row
from cpm_cluster.training.data.packing import Sample, encode_rows
from cpm_cluster.training.data.tokenizer import Tokenizer
from cpm_cluster.training.model.decoder import CPM, initial_weight

TINY = {
    "format": 1,
    "output_dir": "/nowhere",
    "expected_world_size": 2,
    "seed": 7,
    "deterministic": False,
    "engine": "torch",
    "task": "finetune",
    "model": {
        "name": "cpm-test",
        "layers": 2,
        "hidden": 32,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 8,
        "ffn": 48,
        "vocab": 259,
        "norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tied_embeddings": False,
    },
    "init_from": None,
    "tokenizer": "bytes",
    "method": {"kind": "full"},
    "adapter": None,
    "data": {"train": [], "eval": [], "format": "jsonl", "trust_pickle": False},
    "training": {
        "seq_len": 48,
        "micro_batch": 2,
        "grad_accum": 1,
        "steps": 6,
        "lr": 1e-2,
        "min_lr_ratio": 0.1,
        "schedule": "cosine",
        "warmup_steps": 2,
        "weight_decay": 0.1,
        "betas": [0.9, 0.95],
        "eps": 1e-8,
        "clip_grad_norm": 1.0,
        "precision": "fp32",
        "recompute": "none",
        "attention": "auto",
        "zero_stage": 0,
        "offload_optimizer": False,
        "log_every": 1,
        "eval_every": 3,
        "checkpoint": {"every": 3, "keep": 2, "asynchronous": False},
        "guard": {"nonfinite": "stop", "spike": "ignore", "spike_deviations": 6.0, "window": 64, "limit": 10},
    },
    "evaluation": {"choices": [], "shots": 0},
    "generation": None,
    "samples": {"prompts": ["the cat"], "max_tokens": 8, "temperature": 0.8},
    "work": {"flops_per_token": None, "peak_flops_per_rank": None},
}

ROWS = [{"input": "", "output": "the cat sat on the mat"}, {"input": "who?", "output": "the dog"}] + [
    {"input": "", "output": "sat on " * n + str(n)} for n in range(1, 6)
]


def source(path: object, weight: float | None = None) -> dict:
    """Return a source as it stands in trainer.json."""
    return {"path": str(path), "weight": weight}


def changed(settings: dict, changes: dict) -> dict:
    """Return a copy of settings in which dotted keys have other values."""
    settings = copy.deepcopy(settings)
    for dotted, value in changes.items():
        *parents, last = dotted.split(".")
        part = settings
        for parent in parents:
            part = part[parent]
        part[last] = value
    return settings


def paired(*sequences: Iterable) -> Iterator[tuple]:
    """Return ``zip(..., strict=True)``, which Python 3.8 has not."""
    lists = [list(sequence) for sequence in sequences]
    assert len({len(items) for items in lists}) == 1
    return zip(*lists)


def encode_row(row: Row, tokenizer: Tokenizer) -> Sample:
    """Return one row as a sample."""
    (sample,) = encode_rows([row], tokenizer)
    return sample


def initialise(model: CPM) -> None:
    """Draw the weights that training from nothing begins with."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(initial_weight(name, weight.shape, model.settings))


class TinyRun:
    """A run directory with its settings, and what one reads in it."""

    def __init__(self, directory: Path, changes: dict) -> None:
        self.directory = directory
        directory.mkdir(parents=True)
        data = directory / "data.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        base = changed(TINY, {"output_dir": str(directory), "data.train": [source(data)], "data.eval": [source(data)]})
        self.raw = changed(base, changes)

    def write_settings(self) -> str:
        """Write trainer.json and return its path; skips the test where torch is too old for such a run."""
        require_torch_for(self.raw)
        return self.write_any_settings()

    def write_any_settings(self) -> str:
        """Write trainer.json and return its path."""
        path = self.directory / "trainer.json"
        path.write_text(json.dumps(self.raw))
        return str(path)

    def start(self, world_size: int = 2, torchrun: bool = False):
        """Start the ranks in the background."""
        from training_ranks import start_ranks

        return start_ranks(self.write_settings(), world_size, self.directory, torchrun)

    def train(self, world_size: int = 2, torchrun: bool = False, **changes: object) -> list[int]:
        """Run to the end with top-level settings changed; return exit codes."""
        from training_ranks import finish

        self.raw = changed(self.raw, changes)
        return finish(self.start(world_size, torchrun))

    def change(self, dotted: str, value: object) -> None:
        """Change one setting for the next attempt."""
        self.raw = changed(self.raw, {dotted: value})

    def json(self, name: str) -> dict:
        """Read a JSON file of the run."""
        return json.loads((self.directory / name).read_text())

    def lines(self, name: str) -> list[dict]:
        """Read a jsonl file of the run."""
        return [json.loads(line) for line in (self.directory / name).read_text().splitlines()]

    @property
    def steps_recorded(self) -> int:
        """The number of steps that a live run has recorded."""
        path = self.directory / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    def ask_to_stop(self) -> None:
        """Leave the file that asks all ranks to stop."""
        (self.directory / "control").mkdir(exist_ok=True)
        (self.directory / "control/stop").touch()

    def withdraw_stop(self) -> None:
        """Remove that file, as whoever starts the next attempt does."""
        (self.directory / "control/stop").unlink()

    def tensors(self, name: str) -> dict:
        """Read a file of tensors of the run."""
        return torch.load(self.directory / name, weights_only=True)

    def log(self, rank: int = 0) -> str:
        """Read what a rank printed."""
        return (self.directory / f"rank-{rank}.log").read_text()

    @property
    def losses(self) -> list[float]:
        """The loss of each recorded step."""
        return [line["loss"] for line in self.lines("metrics.jsonl")]
