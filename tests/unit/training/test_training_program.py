"""The parts that a launch touches: placement, loss scale, start and end of the program."""

from __future__ import annotations

import json
import math
import os
import sys

import pytest
import torch
import torch.distributed.fsdp
from tiny_runs import encode_row
from torch_here import needs_torch_engine

from cpm_cluster.training.checkpoint import damage_of
from cpm_cluster.training.data.corpus import Row
from cpm_cluster.training.data.packing import collate
from cpm_cluster.training.data.tokenizer import load_tokenizer
from cpm_cluster.training.engines import open_engine
from cpm_cluster.training.engines.fsdp import shard_model
from cpm_cluster.training.engines.loss_scale import LossScale
from cpm_cluster.training.engines.torch_engine import TorchEngine
from cpm_cluster.training.errors import UserError, clear_errors, record_error
from cpm_cluster.training.files import sha256_of, write_atomically, write_json
from cpm_cluster.training.finetune import main
from cpm_cluster.training.model.decoder import CPM
from cpm_cluster.training.placement import (
    Placement,
    confirm_world,
    expect_world_size,
    read_placement,
)

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}


def test_placement_is_what_torchrun_says():
    assert read_placement(TORCHRUN) == Placement(rank=3, world_size=4, local_rank=1)
    assert read_placement({"PATH": "/bin"}) == Placement(rank=0, world_size=1, local_rank=0)


@pytest.mark.parametrize("environment", [{"WORLD_SIZE": "2"}, {**TORCHRUN, "RANK": "x"}])
def test_half_a_launch_is_refused(environment):
    with pytest.raises(UserError, match="start the program with torchrun"):
        read_placement(environment)


def test_n_runs_of_one_are_not_a_run_of_n():
    with pytest.raises(UserError, match="planned for 8 rank.s. but WORLD_SIZE is 1"):
        expect_world_size(Placement(0, 1, 0), 8)


def test_the_group_must_contain_every_rank_once_with_the_same_settings():
    here = Placement(1, 2, 1)
    confirm_world(lambda value: [0, 1] if value == 1 else [value, value], here, 2, b"{}")

    with pytest.raises(UserError, match=r"expected ranks 0 to 1, but the group consists of \[1, 1\]"):
        confirm_world(lambda value: [1, 1], here, 2, b"{}")
    with pytest.raises(UserError, match="read different settings"):
        confirm_world(lambda value: [0, 1], here, 2, b"{}")


def test_an_unknown_engine_is_refused_by_name(tiny_settings):
    with pytest.raises(UserError, match="engine: expected bmtrain or torch, got abacus"):
        open_engine(tiny_settings(engine="abacus"), Placement(0, 1, 0))


def test_the_loss_scale_halves_on_overflow_and_doubles_after_a_thousand_clean_steps():
    scale = LossScale(enabled=True)
    start = scale.value
    scale.update(overflowed=True)
    assert scale.value == start / 2

    for _ in range(999):
        scale.update(overflowed=False)
    resumed = LossScale(enabled=True)
    resumed.restore(scale.as_json())
    assert resumed.value == start / 2
    resumed.update(overflowed=False)
    assert resumed.value == start


def test_a_run_that_changes_its_precision_takes_no_loss_scale_along():
    fp16, bf16 = LossScale(enabled=True), LossScale(enabled=False)
    first = fp16.value
    fp16.update(overflowed=True)

    bf16.restore(fp16.as_json())
    assert bf16.value == 1
    fp16.restore(bf16.as_json())
    assert fp16.value == first


def test_on_a_torch_without_dcp_engine_torch_is_refused_in_one_sentence(tiny_run, capsys, monkeypatch):
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "torch.distributed.checkpoint", None)

    assert main([tiny_run(expected_world_size=1).write_any_settings()]) == 2

    told = capsys.readouterr().err
    assert f"for checkpoints engine torch needs torch 2.4 or newer, this is {torch.__version__}; name engine" in told
    assert "Traceback" not in told


def test_nor_does_a_torch_without_fsdp2_shard(tiny_settings, monkeypatch):
    monkeypatch.delattr(torch.distributed.fsdp, "fully_shard", raising=False)
    model = CPM(tiny_settings().model)

    with pytest.raises(UserError, match=r"training.zero_stage above 0 needs torch 2.6 or newer, .*; use 0 \(DDP\)"):
        shard_model(model, torch.device("cpu"), None, reshard=True)


@needs_torch_engine
def test_an_fp16_overflow_halves_the_scale_until_it_cannot_and_only_then_is_the_guard_asked(tiny_settings):
    tokenizer = load_tokenizer("bytes")
    batch = collate([[encode_row(Row("", "the cat sat"), tokenizer)]], 48)
    engine = TorchEngine(tiny_settings(), Placement(0, 1, 0))
    engine.build()
    engine._loss_scale = LossScale(enabled=True)  # a CPU does not compute in fp16
    embedding = engine._trained["input_embedding.weight"]
    before = embedding.clone()
    asked = []

    def step():
        return engine.train_step([batch], 1e-2, lambda loss, norm: asked.append((loss, norm)), lambda: False)

    hook = embedding.register_hook(lambda gradient: gradient * math.inf)
    overflowed = step()
    assert overflowed.update == "overflow" and asked == []
    halved = step()
    assert halved.loss_scale == overflowed.loss_scale / 2
    engine._loss_scale.restore({"value": 1.0, "clean_steps": 0})
    assert step().update == "refused" and len(asked) == 1 and not math.isfinite(asked[0][1])
    hook.remove()
    with torch.no_grad():
        engine._trained["encoder.output_layernorm.weight"].fill_(math.nan)
    assert step().update == "refused" and math.isnan(asked[1][0])
    assert torch.equal(embedding, before)
    engine.close()


@needs_torch_engine
def test_what_the_guard_refuses_leaves_weights_moments_and_scale_alone(tiny_settings):
    batch = collate([[encode_row(Row("", "the cat sat"), load_tokenizer("bytes"))]], 48)
    engine = TorchEngine(tiny_settings(), Placement(0, 1, 0))
    engine.build()
    engine.train_step([batch], 1e-2, lambda loss, norm: True, lambda: False)
    before = {name: weight.clone() for name, weight in engine._trained.items()}

    refused = engine.train_step([batch], 1e-2, lambda loss, norm: False, lambda: True)
    assert (refused.update, refused.stop) == ("refused", True)
    assert all(torch.equal(weight, before[name]) for name, weight in engine._trained.items())

    applied = engine.train_step([batch], 1e-2, lambda loss, norm: True, lambda: False)
    assert (applied.update, applied.stop, applied.loss) == ("applied", False, refused.loss)
    assert applied.grad_norm == refused.grad_norm  # nothing of the refused gradients was left
    assert not torch.equal(engine._trained["input_embedding.weight"], before["input_embedding.weight"])
    engine.close()


def test_bad_settings_end_the_program_with_code_2_and_one_line(tmp_path, capsys, monkeypatch):
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "trainer.json"
    path.write_text(json.dumps({"output_dir": str(tmp_path / "run")}))

    assert main([str(path)]) == 2

    assert capsys.readouterr().err.count("\n") == 1
    assert "model: missing" in json.loads((tmp_path / "run/errors/rank-0.json").read_text())["message"]


def test_errors_of_an_earlier_attempt_are_cleared(tmp_path, capsys):
    for rank in (0, 1, 5):
        record_error(tmp_path, rank, UserError("earlier"))

    clear_errors(tmp_path, rank=0, world_size=2)

    assert sorted(path.name for path in (tmp_path / "errors").iterdir()) == ["rank-1.json"]
    assert "rank 5: error: earlier" in capsys.readouterr().err


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "state.json"
    write_json(path, {"step": 1})

    def fail(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"loss": float("nan")})

    assert json.loads(path.read_text()) == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_damaged_checkpoint_is_recognised(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"weights")
    entry = {"size": 7, "sha256": sha256_of(tmp_path / "a.pt")}
    assert damage_of(tmp_path) == "its manifest is missing or broken"
    write_json(tmp_path / "manifest.json", {"format": 1, "files": {"a.pt": entry}})
    assert damage_of(tmp_path) is None

    (tmp_path / "a.pt").write_bytes(b"weightz")
    assert damage_of(tmp_path) == "a.pt is not what was written"
    os.remove(tmp_path / "a.pt")
    assert damage_of(tmp_path) == "a.pt is missing"
