"""cpm export: from what a run has trained to what other programs read."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from cpm_cluster.launch.plan import Mount
from cpm_cluster.training import finetune
from cpm_cluster.training.files import sha256_of
from cpm_cluster.training.formats.loading import read_base_weights
from cpm_cluster.training.formats.peft import read_peft
from cpm_cluster.training.model.lora import Delta, merged
from cpm_cluster.training.settings_file import parse_settings

main = pytest.importorskip("cpm_cluster.cli.main", reason="cpm itself needs Python 3.10")
sys.path.insert(0, str(Path(__file__).parents[1] / "runs"))
from made_runs import container, made_run  # noqa: E402, F401

LORA = {"kind": "lora", "rank": 4, "alpha": 8, "dropout": 0.0, "targets": ["project_q", "w_0", "w_out"]}


@pytest.fixture
def finished(tiny_run, made_run):  # noqa: F811
    """Train in this process, in a directory that cpm knows as a run."""

    def train(name, plan=None, **changes):
        run_id = f"{name}-20260102-030405-0001"
        run = tiny_run(f"runs/{run_id}", expected_world_size=1, **{"training.steps": 4, **changes})
        run.change("training.checkpoint.every", 2)
        assert finetune.main([run.write_settings()]) == 0
        made_run(run_id, **(plan or {}))
        return run

    return train


@pytest.fixture
def cpm(capsys, tmp_path):
    """Run `cpm export …` in this process: its exit code, stdout and stderr."""

    def call(*words):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main.main(["export", *map(str, words), "--runs-dir", str(tmp_path / "runs")])
        captured = capsys.readouterr()
        return ended.value.code, captured.out, captured.err

    return call


def weights_in(folder, run):
    return dict(read_base_weights(str(folder), parse_settings(run.raw).model))


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


def test_a_finished_run_is_exported_in_either_format_and_number_type(finished, cpm, tmp_path):
    run = finished("full", **{"training.zero_stage": 3, "model.tied_embeddings": True})
    trained = run.tensors("weights/model.pt")

    code, out, err = cpm("--format", "hf")
    folder = run.directory / "export/hf"
    assert (code, err) == (0, "")
    assert out == f"{run.directory.name} after 4 steps, hf in float32: {folder}\n"
    assert_same(weights_in(folder, run), trained)
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
    config = json.loads((folder / "config.json").read_text())
    assert (config["architectures"], config["torch_dtype"]) == (["LlamaForCausalLM"], "float32")
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)

    code, out, _ = cpm(run.directory.name, "--format", "cpm9g", "--dtype", "bf16", "--json", "--output", tmp_path / "x")
    record = json.loads(out)
    assert (code, record["dtype"], record["folder"]) == (0, "bfloat16", str(tmp_path / "x"))
    assert_same(weights_in(tmp_path / "x", run), {name: weight.bfloat16() for name, weight in trained.items()})
    assert json.loads((tmp_path / "x/export.json").read_text())["files"] == record["files"] == ["cpm-test.pt"]

    code, _, err = cpm("--format", "hf")
    assert code == 2 and f"{folder} is an earlier export" in err and "--force" in err


def test_an_unfinished_run_gives_its_newest_whole_checkpoint_or_the_one_that_is_named(finished, cpm, tmp_path):
    run = finished("half")
    (run.directory / "outcome.json").unlink()
    at_the_end = run.tensors("weights/model.pt")

    assert "after 4 steps" in cpm("--format", "cpm9g", "--output", tmp_path / "four")[1]
    assert_same(torch.load(tmp_path / "four/cpm-test.pt", weights_only=True), at_the_end)

    (run.directory / "checkpoints/step-00000004/__0_0.distcp").write_bytes(b"torn")
    assert "after 2 steps" in cpm("--format", "cpm9g", "--output", tmp_path / "two")[1]
    two = torch.load(tmp_path / "two/cpm-test.pt", weights_only=True)
    assert set(two) == set(at_the_end) and not torch.equal(two["lm_head.weight"], at_the_end["lm_head.weight"])

    code, _, err = cpm("--format", "cpm9g", "--output", tmp_path / "torn", "--step", 4)
    assert code == 2 and "no whole checkpoint (step 4: __0_0.distcp is not what was written)" in err
    code, _, err = cpm("--format", "cpm9g", "--output", tmp_path / "x", "--step", 3)
    assert code == 2 and err.endswith("has no checkpoint of step 3; there are: 2, 4\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["four", "runs", "two"]


def test_updates_are_exported_alone_or_folded_into_the_base_where_this_host_has_it(finished, cpm, tmp_path):
    base = finished("base")
    # the container has this folder under another name
    plan = {"container": container(mounts=(Mount(str(base.directory), "/models", True, "test"),))}
    weights = base.directory / "weights/model.pt"
    run = finished("tuned", plan, method=LORA, init_from=str(weights))
    factors = run.tensors("weights/delta.pt")
    text = run.write_settings()
    Path(text).write_text(Path(text).read_text().replace(str(weights), "/models/weights/model.pt"))
    name = run.directory.name

    code, out, err = cpm(name, "--format", "hf", "--merge", "--json")
    assert (code, err) == (0, "")
    record = json.loads(out)
    assert record["logits"]["largest"] <= record["logits"]["tolerance"] < 1e-3
    expected = dict(merged(torch.load(weights, weights_only=True), Delta(factors, 8.0)))
    assert_same(weights_in(run.directory / "export/hf", run), expected)

    code, out, _ = cpm(name, "--format", "cpm9g", "--merge", "--dtype", "bf16")
    assert code == 0 and "logits differ from the trained model's by up to" in out
    halved = {name: weight.bfloat16() for name, weight in expected.items()}
    assert_same(weights_in(run.directory / "export/cpm9g", run), halved)

    assert cpm(name, "--format", "lora")[0] == 0
    adapter = read_peft(run.directory / "export/lora")
    assert (adapter.alpha, adapter.rank, adapter.targets) == (8.0, 4, tuple(sorted(LORA["targets"])))
    assert_same(adapter.factors, factors)
    raw = torch.load(run.directory / "export/lora/cpm-test-delta.pt", weights_only=True)
    assert set(raw) == set(factors)

    # an adapter from elsewhere, of either kind, by way of the same run
    for number, adapter in enumerate(("export/lora", "export/lora/cpm-test-delta.pt")):
        words = ("--merge", "--adapter", run.directory / adapter, "--output", tmp_path / str(number))
        assert "init_from is not set" in cpm(base.directory.name, "--format", "hf", *words)[2]
        code, out, _ = cpm(name, "--format", "cpm9g", *words)
        assert code == 0 and out.startswith(f"{run.directory / adapter}, cpm9g in float32: {tmp_path / str(number)}")
        for key, weight in weights_in(tmp_path / str(number), run).items():
            torch.testing.assert_close(weight, expected[key])

    weights.unlink()
    code, out, _ = cpm(name, "--format", "hf", "--merge", "--force", "--json")
    assert code == 2 and json.loads(out)["error"] == f"--merge: the base weights {weights} are not here"
    assert_same(weights_in(run.directory / "export/hf", run), expected)


def test_a_run_of_an_earlier_version_can_be_exported(finished, cpm):
    run = finished("old", **{"training.steps": 2})
    old = {key: value for key, value in run.raw.items() if key not in ("task", "work", "generation", "data")}
    (run.directory / "trainer.json").write_text(json.dumps({**old, "parallel": "ddp"}))
    assert cpm("--format", "hf")[0] == 0

    (run.directory / "trainer.json").write_text(json.dumps({**old, "model": {"name": "x"}}))
    code, _, err = cpm("--format", "hf", "--force")
    assert code == 2 and "trainer.json is not of this trainer: model.layers: missing; model.hidden: missing" in err


def test_the_tokenizer_comes_along_or_is_missed_aloud(finished, cpm, tmp_path):
    from cpm_cluster.training.data.tokenizer import SPECIAL_TOKENS

    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("".join(json.dumps(token) + "\n" for token in SPECIAL_TOKENS))
    run = finished("words", tokenizer=str(vocabulary))

    assert cpm("--format", "hf")[0] == 0
    assert (run.directory / "export/hf/vocab.txt").read_text() == vocabulary.read_text()

    vocabulary.unlink()
    code, out, _ = cpm("--format", "hf", "--force")
    assert code == 0 and f"warning: without a tokenizer: cannot read the vocabulary {vocabulary}" in out
    assert json.loads((run.directory / "export/hf/config.json").read_text())["eos_token_id"] is None


def test_a_checkpoint_of_bmtrain_is_put_together_from_its_parts(finished, cpm, tmp_path):
    run = finished("parts", **{"training.steps": 2})
    whole = run.tensors("weights/model.pt")
    directory = run.directory / "checkpoints/step-00000002"
    for path in directory.iterdir():
        path.unlink()
    for rank, part in enumerate((slice(None, 100), slice(100, None))):
        held = {f"{name}/weight": weight.flatten()[part].clone() for name, weight in whole.items()}
        torch.save(held, directory / f"part-{rank}.pt")
    (directory / "parts.json").write_text(
        json.dumps({"world_size": 2, "updates": 2, "loss_scale": 1.0, "steps_since_last_scale": 0})
    )
    files = {path.name: {"size": path.stat().st_size, "sha256": sha256_of(path)} for path in directory.iterdir()}
    (directory / "manifest.json").write_text(json.dumps({"format": 2, "step": 2, "world_size": 2, "files": files}))
    run.change("engine", "bmtrain")
    run.write_settings()

    assert cpm("--format", "hf", "--step", 2)[0] == 0

    assert_same(weights_in(run.directory / "export/hf", run), whole)


def test_what_cannot_be_exported_is_one_sentence(finished, cpm, made_run):  # noqa: F811
    run = finished("full", **{"training.steps": 2})
    made_run("program-20260102-030405-0002", trainer=False)
    expected = {
        ("full", "--format", "lora"): "this run has trained all weights; use --format hf or cpm9g",
        ("full", "--format", "hf", "--merge"): "this run has trained all weights, there is nothing to fold",
        ("full", "--format", "hf", "--output", run.directory): f"{run.directory} exists and is no export",
        (
            "full",
            "--format",
            "lora",
            "--adapter",
            run.directory,
        ): "is no adapter of PEFT: adapter_config.json is missing",
        ("full", "--format", "lora", "--adapter", run.directory / "weights/model.pt"): "is no LoRA delta",
        ("full", "--format", "gguf"): "'gguf' is not one of 'hf', 'cpm9g', 'lora'",
        ("full",): "Missing option '--format'",
        ("nobody", "--format", "hf"): "nobody is no run",
        ("program", "--format", "hf"): "is a program of your own (engine: command)",
    }

    for words, message in expected.items():
        code, out, err = cpm(*words)
        assert (code, out) == (2, "") and message in err
    assert not (run.directory / "export").exists()


def test_without_torch_it_says_what_to_install(made_run, cpm, monkeypatch):  # noqa: F811
    made_run()
    monkeypatch.setattr("cpm_cluster.cli.export.find_spec", lambda name: None)

    assert cpm("--format", "hf") == (
        3,
        "",
        "error: cpm export needs torch, which is not installed here: pip install 'cpm-cluster[train]'\n",
    )
