"""trainer.json: what is accepted, and how everything wrong with it is said at once."""

from __future__ import annotations

import json

import pytest

from cpm_cluster.training.errors import UserError
from cpm_cluster.training.settings import FullTuning, LoraTuning
from cpm_cluster.training.settings_file import parse_settings, read_settings


def refusal(raw: object) -> str:
    with pytest.raises(UserError) as caught:
        parse_settings(raw)
    return str(caught.value)


def test_settings_become_nested_values(tiny_settings):
    settings = tiny_settings(**{"training.lr": 1})

    assert settings.model.kv_heads == 2
    assert settings.training.betas == (0.9, 0.95)
    assert settings.training.lr == 1.0 and isinstance(settings.training.lr, float)
    assert settings.training.checkpoint.keep == 2
    assert settings.method == FullTuning("full")


def test_lora_settings_are_told_from_full_tuning_by_their_kind(tiny_settings):
    lora = {"kind": "lora", "rank": 8, "alpha": 16, "dropout": 0.05, "targets": ["project_q", "w_0"]}

    assert tiny_settings(method=lora).method == LoraTuning("lora", 8, 16.0, 0.05, ("project_q", "w_0"))


def test_settings_cannot_be_changed(tiny_settings):
    with pytest.raises(AttributeError):
        tiny_settings().seed = 3


def test_all_problems_are_reported_in_one_error(tiny_json):
    raw = tiny_json(**{"training.lr": "fast", "training.steps": 0, "model.size": 3, "task": "dream"})
    del raw["model"]["hidden"]

    message = refusal(raw)

    assert 'training.lr: expected a number, got "fast"' in message
    assert "model.size: unknown key" in message
    assert "model.hidden: missing" in message
    assert 'task: expected "pretrain" or "finetune" or "evaluate" or "generate", got "dream"' in message
    assert "4 problem(s)" in message


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("training.steps", 0, "training.steps: must be at least 1"),
        ("training.steps", True, "training.steps: expected a whole number, got true"),
        ("training.steps", 1.5, "training.steps: expected a whole number, got 1.5"),
        ("training.lr", float("nan"), "training.lr: expected a number"),
        ("training.betas", [0.9], "training.betas: expected 2 values, got 1"),
        ("training.betas", [0.9, 1.0], "training.betas: must be in [0, 1)"),
        ("training.eval_every", -1, "training.eval_every: must not be negative"),
        ("training.clip_grad_norm", -0.5, "training.clip_grad_norm: must not be negative"),
        ("training.warmup_steps", 7, "training.warmup_steps: must be between 0 and steps"),
        ("training.checkpoint", 100, "training.checkpoint: expected an object, got 100"),
        ("training.precision", "fp8", 'training.precision: expected "fp32" or "bf16" or "fp16"'),
        ("model.kv_heads", 3, "model.kv_heads: must divide model.heads"),
        ("model.kv_heads", 0, "model.kv_heads: must be at least 1"),
        ("model.head_dim", 7, "model.head_dim: must be even"),
        ("data.train", [], "data.train: must name at least one file"),
        ("data.train", [1], "data.train[0]: expected an object, got 1"),
        ("output_dir", "here", "output_dir: must be an absolute path"),
        ("deterministic", 1, "deterministic: expected true or false, got 1"),
        ("init_from", 3, "init_from: expected a text, got 3"),
        ("adapter", 3, "adapter: expected a text, got 3"),
        ("adapter", "/adapter", "adapter: needs method lora"),
        ("format", 2, "format: expected 1, got 2"),
        (
            "method",
            {"kind": "prefix"},
            'method: expected an object with {"kind": "full"} or {"kind": "lora"}',
        ),
        ("method", {"kind": "full", "rank": 3}, "method.rank: unknown key"),
        (
            "method",
            {"kind": "lora", "rank": 0, "alpha": 1, "dropout": 1, "targets": ["head"]},
            "method.rank: must be at least 1; method.dropout: must be in [0, 1); method.targets: head not",
        ),
    ],
)
def test_a_wrong_value_is_named_with_what_was_expected(tiny_json, key, value, says):
    assert says in refusal(tiny_json(**{key: value}))


def test_a_file_that_is_not_json_is_refused_by_name(tmp_path):
    path = tmp_path / "trainer.json"
    path.write_text("{")

    with pytest.raises(UserError, match="trainer.json is not JSON"):
        read_settings(path)
    with pytest.raises(UserError, match="cannot read .*absent.json: No such file"):
        read_settings(tmp_path / "absent.json")


def test_a_file_is_read(tmp_path, tiny_json, tiny_settings):
    path = tmp_path / "trainer.json"
    path.write_text(json.dumps(tiny_json()))

    assert read_settings(path) == tiny_settings()
    assert refusal([]) == "the settings have 1 problem(s): the file: expected an object, got []"
