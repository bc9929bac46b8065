"""Weights of others: what we write, transformers and PEFT compute alike; what they write, we read."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
import torch

from cpm_cluster.training.errors import UserError
from cpm_cluster.training.formats.huggingface import our_module, their_module, write_config, write_weights
from cpm_cluster.training.formats.loading import read_base_weights
from cpm_cluster.training.formats.opendelta import read_opendelta, write_opendelta
from cpm_cluster.training.formats.peft import read_peft, write_peft
from cpm_cluster.training.formats.tensor_files import EXPORT_RECORD, as_type, new_folder, write_torch_file
from cpm_cluster.training.model.decoder import CPM
from cpm_cluster.training.model.lora import LORA_TARGETS, Delta, attach_lora, is_factor, merged
from cpm_cluster.training.probe import TOLERANCES, probe_logits, require_equal
from cpm_cluster.training.settings import LoraTuning, ModelSettings

LORA = LoraTuning("lora", rank=4, alpha=10.0, dropout=0.0, targets=LORA_TARGETS)


def model_settings(kv_heads: int = 2, tied: bool = False, theta: float = 5e5, head_dim: int = 12) -> ModelSettings:
    """Dimensions in which no two are equal, so that none can be taken for another."""
    return ModelSettings("cpm-test", 3, 64, 4, kv_heads, head_dim, 96, 200, 1e-5, theta, tied)


def made(settings: ModelSettings, lora: LoraTuning | None = None) -> CPM:
    """A model of random weights, norms and both factors of LoRA included."""
    torch.manual_seed(3)
    model = CPM(settings)
    if lora is not None:
        attach_lora(model, lora)
    with torch.no_grad():
        for weight in model.parameters():
            weight.uniform_(0.5, 1.5) if weight.dim() == 1 else weight.normal_(std=0.08)
    return model.eval()


def parted(model: CPM) -> tuple[dict, Delta]:
    """Base weights and updates of a model."""
    weights = model.state_dict()
    base = {name: weight for name, weight in weights.items() if not is_factor(name)}
    return base, Delta({name: weight for name, weight in weights.items() if is_factor(name)}, LORA.alpha)


def in_llama_layout(folder: Path, settings: ModelSettings, weights: dict, shard_bytes: int = 60_000) -> Path:
    folder.mkdir()
    write_config(folder, settings, torch.float32, 64, 1, 2)
    write_weights(folder, weights, lambda name: None, shard_bytes)
    return folder


def ids_of(settings: ModelSettings) -> torch.Tensor:
    return torch.randint(settings.vocab, (2, 40), generator=torch.Generator().manual_seed(5))


def our_logits(model: CPM, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, torch.zeros_like(ids), torch.arange(ids.shape[1]).expand_as(ids))


def their_logits(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def assert_same(found, expected: dict) -> None:
    assert set(found) == set(expected)
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


@pytest.mark.parametrize(
    ("kv_heads", "tied", "theta"), [(4, False, 1e4), (2, False, 5e5), (1, True, 1e4), (2, True, 5e5)]
)
def test_transformers_computes_the_same_logits_and_writes_what_we_read(tmp_path, kv_heads, tied, theta):
    transformers = pytest.importorskip("transformers")
    settings = model_settings(kv_heads, tied, theta)
    model = made(settings)
    folder = in_llama_layout(tmp_path / "ours", settings, model.state_dict())
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 3

    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)

    ids = ids_of(settings)
    difference = (their_logits(theirs, ids) - our_logits(model, ids)).abs().max()
    assert type(theirs).__name__ == "LlamaForCausalLM" and difference <= 1e-5, difference
    assert our_logits(model, ids).std() > 0.3
    assert_same(read_base_weights(str(folder), settings), model.state_dict())
    theirs.save_pretrained(tmp_path / "theirs")
    assert_same(read_base_weights(str(tmp_path / "theirs"), settings), model.state_dict())


def test_peft_loads_the_adapter_and_computes_the_same_logits_and_writes_what_we_read(tmp_path):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    settings = model_settings()
    model = made(settings, LORA)
    base, delta = parted(model)
    (tmp_path / "adapter").mkdir()
    write_peft(tmp_path / "adapter", delta, 0.1, None, lambda name: None)

    llama = transformers.AutoModelForCausalLM.from_pretrained(in_llama_layout(tmp_path / "base", settings, base))
    plain = their_logits(llama, ids_of(settings))
    theirs = peft.PeftModel.from_pretrained(llama, tmp_path / "adapter").eval()

    ids = ids_of(settings)
    assert (their_logits(theirs, ids) - our_logits(model, ids)).abs().max() <= 1e-5
    assert (their_logits(theirs, ids) - plain).abs().max() > 0.1
    theirs.save_pretrained(tmp_path / "theirs")
    for folder in (tmp_path / "adapter", tmp_path / "theirs"):
        found = read_peft(folder)
        assert (found.alpha, found.rank, found.targets) == (LORA.alpha, LORA.rank, tuple(sorted(LORA.targets)))
        assert_same(found.factors, dict(delta.factors))


def test_an_adapter_with_the_scale_of_rslora_is_read_as_one_with_ours(tmp_path):
    _, delta = parted(made(model_settings(), LORA))
    write_peft(tmp_path, delta, 0.0, None, lambda name: None)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "use_rslora": True}))

    found = read_peft(tmp_path)

    assert found.alpha / found.rank == pytest.approx(LORA.alpha / LORA.rank**0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type IA3"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"r": None}, "r and lora_alpha"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"use_rslora": True, "rank_pattern": {"q_proj": 8}}, "use_rslora with rank_pattern"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: pissa, which changes the base weights, too"),
    ],
)
def test_an_adapter_that_is_more_than_our_lora_is_refused(tmp_path, change, message):
    _, delta = parted(made(model_settings(), LORA))
    write_peft(tmp_path, delta, 0.0, None, lambda name: None)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **change}))

    with pytest.raises(UserError, match=message):
        read_peft(tmp_path)


def test_a_delta_for_cpm_9g_is_scaled_as_its_merge_script_expects(tmp_path):
    base, delta = parted(made(model_settings(), LORA))
    write_opendelta(tmp_path / "x-delta.pt", delta, lambda name: None)

    raw = torch.load(tmp_path / "x-delta.pt", weights_only=True)
    layer = "encoder.layers.2.ffn.ffn.w_in.w_0"
    by_script = base[layer + ".weight"] + 64 / 4 * raw[layer + ".lora.lora_B"] @ raw[layer + ".lora.lora_A"]

    torch.testing.assert_close(by_script, merged(base, delta)[layer + ".weight"])
    again = merged(base, read_opendelta(tmp_path / "x-delta.pt"))
    for name, weight in merged(base, delta).items():
        torch.testing.assert_close(again[name], weight)
    torch.save(base, tmp_path / "base.pt")
    with pytest.raises(UserError, match="no LoRA delta: input_embedding.weight"):
        read_opendelta(tmp_path / "base.pt")


def test_every_name_has_its_counterpart():
    modules = {name.rpartition(".")[0] for name in made(model_settings()).state_dict()}
    assert len(modules) == 3 + 3 * 9
    assert {our_module(their_module(name)) for name in modules} == modules


def test_weights_of_cpm_9g_are_read_from_one_file_and_from_several(tmp_path):
    settings = model_settings()
    weights = made(settings).state_dict()
    torch.save(weights, tmp_path / "whole.pt")
    assert_same(read_base_weights(str(tmp_path / "whole.pt"), settings), weights)

    names = list(weights)
    (tmp_path / "parts").mkdir()
    for number, some in enumerate((names[:7], names[7:])):
        torch.save({name: weights[name].clone() for name in some}, tmp_path / f"parts/{number}.pt")
    assert_same(read_base_weights(str(tmp_path / "parts"), settings), weights)

    torch.save({names[0]: weights[names[0]].clone()}, tmp_path / "parts/9.pt")
    with pytest.raises(UserError, match=f"9.pt holds {names[0]}, which another file"):
        read_base_weights(str(tmp_path / "parts"), settings)


def test_a_large_file_is_mapped_and_an_old_one_is_read(tmp_path):
    weights = made(model_settings()).state_dict()
    torch.save(weights, tmp_path / "new.pt")
    torch.save(weights, tmp_path / "old.pt", _use_new_zipfile_serialization=False)

    new, old = (read_base_weights(str(tmp_path / name), model_settings()) for name in ("new.pt", "old.pt"))

    assert_same(old, weights)
    name = "lm_head.weight"
    maps = "mmap" in inspect.signature(torch.load).parameters  # since torch 2.1
    assert (str(tmp_path / "new.pt") in Path("/proc/self/maps").read_text()) == maps
    assert torch.equal(new[name], weights[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_theta": 1e4}, "rope_theta is 10000.0 instead of 500000.0"),
        ({"num_attention_heads": 8, "head_dim": 6}, "num_attention_heads is 8 instead of 4; head_dim is 6"),
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps is 1e-06"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_type is llama3"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ({"model_type": "gpt2"}, "model_type gpt2; the trainer reads llama"),
    ],
)
def test_a_config_that_says_another_model_is_refused(tmp_path, change, message):
    settings = model_settings()
    folder = in_llama_layout(tmp_path / "hf", settings, made(settings).state_dict())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))

    with pytest.raises(UserError, match=message):
        read_base_weights(str(folder), settings)


def test_what_holds_no_base_weights_is_refused_with_one_sentence(tmp_path):
    settings = model_settings()
    folder = in_llama_layout(tmp_path / "hf", settings, made(settings).state_dict())
    next(folder.glob("model-00002-*")).unlink()
    _, delta = parted(made(settings, LORA))
    torch.save(delta.factors, tmp_path / "delta.pt")
    (tmp_path / "torn.pt").write_bytes((tmp_path / "delta.pt").read_bytes()[:-100])
    torch.save({"a": 1}, tmp_path / "numbers.pt")
    (tmp_path / "adapter").mkdir()
    write_peft(tmp_path / "adapter", delta, 0.0, None, lambda name: None)
    expected = {
        "hf": "lacks 1 file.s. of model.safetensors.index.json, among them model-00002-of-",
        f"hf/{next(folder.glob('*.safetensors')).name}": "name the folder instead",
        "delta.pt": "holds LoRA updates, no base weights",
        "torn.pt": "cannot read weights from",
        "numbers.pt": "not a dictionary of tensors",
        "adapter": "an adapter of PEFT",
        "nothing": "cannot read weights from .*nothing",
    }
    for name, message in expected.items():
        with pytest.raises(UserError, match=message):
            read_base_weights(str(tmp_path / name), settings)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no weights"):
        read_base_weights(str(tmp_path / "empty"), settings)


@pytest.mark.parametrize("tied", [True, False])
def test_the_probe_computes_layer_by_layer_what_the_model_computes(tied):
    settings = model_settings(tied=tied)
    model = made(settings, LORA)
    base, delta = parted(model)
    ids = torch.randint(settings.vocab, (1, 32), generator=torch.Generator().manual_seed(9))

    torch.testing.assert_close(probe_logits(settings, base, delta), our_logits(model, ids)[0])


@pytest.mark.parametrize("dtype", list(TOLERANCES))
def test_a_merge_is_the_trained_model_up_to_rounding(dtype):
    settings = model_settings()
    base, delta = parted(made(settings, LORA))
    base = dict(as_type(base, dtype))

    found = require_equal(settings, base, delta, merged(base, delta))

    assert found.largest <= found.tolerance
    assert found.largest > found.tolerance / 1000


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("wrong", ["another alpha", "a layer left out", "not a number"])
def test_a_merge_that_is_another_model_is_refused(dtype, wrong):
    settings = model_settings()
    base, delta = parted(made(settings, LORA))
    base = dict(as_type(base, dtype))
    whole = dict(merged(base, Delta(delta.factors, LORA.alpha * 1.5 if wrong == "another alpha" else LORA.alpha)))
    name = "encoder.layers.1.ffn.ffn.w_out.weight"
    if wrong == "a layer left out":
        whole[name] = base[name]
    elif wrong == "not a number":
        whole[name] = whole[name].clone().fill_(float("nan"))

    with pytest.raises(UserError, match="not the model that was trained"):
        require_equal(settings, base, delta, whole)


def test_an_index_names_no_file_outside_its_folder(tmp_path):
    settings = model_settings()
    write_config(tmp_path, settings, torch.float32, 64, 1, 2)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"lm_head.weight": "../secret.bin"}}')

    with pytest.raises(UserError, match=r"\.\./secret\.bin is not the name of a file in this folder"):
        read_base_weights(str(tmp_path), settings)


def test_a_number_that_fp16_has_not_is_refused_by_name():
    weights = as_type({"a.weight": torch.tensor([1e5]), "b.weight": torch.tensor([float("inf")])}, torch.float16)
    assert weights["b.weight"].isinf().all()
    with pytest.raises(UserError, match="a.weight holds numbers beyond the 65504 of fp16"):
        weights["a.weight"]


def test_a_torch_file_is_written_with_one_tensor_in_memory(tmp_path):
    weights = made(model_settings()).state_dict()
    heard = []

    write_torch_file(tmp_path / "x.pt", as_type(weights, torch.bfloat16), heard.append)

    assert heard == list(weights) and [path.name for path in tmp_path.iterdir()] == ["x.pt"]
    assert_same(torch.load(tmp_path / "x.pt", weights_only=True), dict(as_type(weights, torch.bfloat16)))


def test_a_folder_appears_whole_or_not_at_all_and_replaces_nothing_but_an_export(tmp_path):
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "new", replace=False) as folder:
        (folder / "half").touch()
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []

    for content in "ab":
        with new_folder(tmp_path / "new", replace=True) as folder:
            (folder / EXPORT_RECORD).write_text(content)
        assert (tmp_path / "new" / EXPORT_RECORD).read_text() == content
    assert [path.name for path in tmp_path.iterdir()] == ["new"]

    with pytest.raises(UserError, match="is an earlier export"), new_folder(tmp_path / "new", replace=False):
        pass
    (tmp_path / "home").mkdir()
    (tmp_path / "home/diary").touch()
    with pytest.raises(UserError, match="exists and is no export"), new_folder(tmp_path / "home", replace=True):
        pass
    assert (tmp_path / "home/diary").exists()
