"""What a run of the torch engine starts from: the same weights wherever they lie and however they are spread."""

from __future__ import annotations

import pytest
import torch

from cpm_cluster.training import finetune
from cpm_cluster.training.engines import torch_engine
from cpm_cluster.training.formats.huggingface import write_config, write_weights
from cpm_cluster.training.settings_file import parse_settings

LORA = {"kind": "lora", "rank": 4, "alpha": 8, "dropout": 0.1, "targets": ["project_q", "w_0", "w_out"]}


@pytest.fixture
def trained(tiny_run):
    """Train three steps in this process, from the second one on at a rate that shows."""

    def train(name, **changes):
        run = tiny_run(name, expected_world_size=1, **{"training.steps": 3, "training.warmup_steps": 0, **changes})
        assert finetune.main([run.write_settings()]) == 0
        return run

    return train


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_both_formats_of_base_weights_start_the_same_run(trained, tmp_path, zero_stage):
    base = trained("base")
    weights = base.tensors("weights/model.pt")
    (tmp_path / "hf").mkdir()
    write_config(tmp_path / "hf", parse_settings(base.raw).model, torch.float32, 48, 1, 2)
    write_weights(tmp_path / "hf", weights, lambda name: None, shard_bytes=20_000)

    changes = {"method": LORA, "training.zero_stage": zero_stage}
    from_file = trained("from_file", init_from=str(base.directory / "weights/model.pt"), **changes)
    from_folder = trained("from_folder", init_from=str(tmp_path / "hf"), **changes)

    assert from_folder.losses == from_file.losses
    assert from_file.losses[0] < base.losses[0] - 0.1


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_frozen_matrices_of_half_the_size_compute_the_same_to_the_bit(trained, monkeypatch, zero_stage):
    seen = []
    distribute = torch_engine.TorchEngine._distribute

    def watched(engine, weights):
        replica = distribute(engine, weights)
        seen.append({name: weight.dtype for name, weight in engine._model.named_parameters()})
        return replica

    monkeypatch.setattr(torch_engine.TorchEngine, "_distribute", watched)
    changes = {"method": LORA, "training.precision": "bf16", "training.zero_stage": zero_stage}
    half = trained("half", **changes)
    monkeypatch.setattr(torch_engine.TorchEngine, "_linear_type", lambda engine: torch.float32)
    whole = trained("whole", **changes)

    assert half.losses == whole.losses
    types = seen[0]
    layer = "encoder.layers.0.self_att.self_attention.project_q"
    assert types[layer + ".weight"] == types["lm_head.weight"] == torch.bfloat16
    assert types[layer + ".lora.lora_A"] == types["input_embedding.weight"] == torch.float32
    assert set(seen[1].values()) == {torch.float32}


def test_a_base_is_refused_with_one_sentence(trained, tiny_run, capsys):
    base = trained("base")
    run = tiny_run("run", expected_world_size=1, init_from=str(base.directory / "checkpoints"))
    assert finetune.main([run.write_settings()]) == 2
    torch.distributed.destroy_process_group()
    assert "checkpoints holds no weights: neither" in capsys.readouterr().err

    run.change("init_from", str(base.directory / "weights/model.pt"))
    run.change("model.ffn", 64)
    assert finetune.main([run.write_settings()]) == 2
    torch.distributed.destroy_process_group()
    assert "w_out.weight is [32, 48] instead of [32, 64]" in capsys.readouterr().err
