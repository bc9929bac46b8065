"""What begins with a LoRA adapter: evaluation and generation beside the base, and training that goes on from it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import bmtrain_ranks
import bmtrain_shim
import pytest
import torch
from tiny_runs import TinyRun, changed

from cpm_cluster.training import evaluate, finetune, generate
from cpm_cluster.training.adapter import open_adapter
from cpm_cluster.training.errors import UserError
from cpm_cluster.training.export import Wanted, export
from cpm_cluster.training.settings_file import parse_settings
from cpm_cluster.training.trained import read_recipe, shapes_of

pytestmark = pytest.mark.timeout(120)

LORA = {"kind": "lora", "rank": 4, "alpha": 16.0, "dropout": 0.0, "targets": ["project_q", "project_v", "w_0", "w_out"]}
# OpenDelta's files say no alpha, and are for that of CPM-9G.
OPENDELTA = {**LORA, "alpha": 64.0}
PROMPTS = ["who?", "the cat", "sat on sat", ""]
SMALL_STEP = {"training.steps": 1, "training.lr": 1e-12, "training.warmup_steps": 0, "training.eval_every": 1}


class Made:
    """A base, what was tuned on it, and the exports of both: updates alone, and folded into the base."""

    def __init__(self, folder: Path) -> None:
        base = TinyRun(folder / "base", {"expected_world_size": 1})
        assert finetune.main([base.write_settings()]) == 0
        self.base = base.directory / "weights/model.pt"
        tuning = {"training.steps": 30, "training.lr": 1e-2, "training.eval_every": 10}
        named = {"method": LORA, "init_from": str(self.base), "expected_world_size": 1}
        self.tuned = TinyRun(folder / "tuned", {**named, **tuning})
        assert finetune.main([self.tuned.write_settings()]) == 0
        self.run = self.tuned.directory
        self.peft, self.merged = folder / "peft", folder / "merged"
        for layout, output, merge in (("lora", self.peft, False), ("hf", self.merged, True)):
            export(Wanted(self.run, layout, output, merge, None, None, False), Path, lambda *progress: None)
        self.prompts = folder / "prompts.jsonl"
        self.prompts.write_text("".join(json.dumps({"input": prompt}) + "\n" for prompt in PROMPTS))

    def adapter(self, form: str) -> dict:
        """What names the adapter in one of its forms."""
        paths = {
            "run": self.run,
            "delta.pt of the run": self.run / "weights/delta.pt",
            "PEFT folder": self.peft,
            "PEFT safetensors": self.peft / "adapter_model.safetensors",
            "OpenDelta": self.peft / "cpm-test-delta.pt",
        }
        return {
            "init_from": str(self.base),
            "method": OPENDELTA if form == "OpenDelta" else LORA,
            "adapter": str(paths[form]),
        }

    @property
    def whole(self) -> dict:
        """What names the same model as whole weights."""
        return {"init_from": str(self.merged)}


FORMS = ["run", "delta.pt of the run", "PEFT folder", "PEFT safetensors", "OpenDelta"]
# zero_stage and ranks
SHARDINGS = [pytest.param(0, 1, id="one rank"), pytest.param(2, 2, id="ZeRO-2"), pytest.param(3, 2, id="ZeRO-3")]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return Made(tmp_path_factory.mktemp("adapter"))


@pytest.fixture
def run_of(tiny_run, made):
    """Make runs of a task."""
    generation = {"prompts": str(made.prompts), "batch": 2, "max_tokens": 12, "temperature": 1.0, "top_p": 0.9}
    of_task = {"evaluate": {}, "generate": {"generation": generation, "data.train": []}, "finetune": {}}

    def make(name: str, task: str, changes: dict, ranks: int = 1, zero_stage: int = 0) -> TinyRun:
        given = {"task": task, "expected_world_size": ranks, "training.zero_stage": zero_stage}
        return tiny_run(name, **{**given, **of_task[task], **changes})

    return make


def finished(run: TinyRun) -> TinyRun:
    """Run on as many ranks as it asks for."""
    ranks = run.raw["expected_world_size"]
    assert run.train(ranks) == [0] * ranks, run.log()
    return run


def loss_of(run: TinyRun) -> float:
    return run.json("evaluation.json")["perplexity"][0]["loss"]


@pytest.mark.parametrize("zero_stage, ranks", SHARDINGS)
def test_base_and_adapter_evaluate_as_the_merged_export(made, run_of, zero_stage, ranks):
    beside = finished(run_of("beside", "evaluate", made.adapter("run"), ranks, zero_stage))
    merged = finished(run_of("merged", "evaluate", made.whole, ranks, zero_stage))
    base = finished(run_of("base", "evaluate", {"init_from": str(made.base)}))

    assert loss_of(beside) == pytest.approx(loss_of(merged), abs=1e-5)
    assert loss_of(beside) < loss_of(base) - 0.05


@pytest.mark.parametrize("zero_stage, ranks", SHARDINGS)
def test_base_and_adapter_generate_as_the_merged_export(made, run_of, zero_stage, ranks):
    beside = finished(run_of("beside", "generate", made.adapter("run"), ranks, zero_stage))
    merged = finished(run_of("merged", "generate", made.whole, ranks, zero_stage))
    base = finished(run_of("base", "generate", {"init_from": str(made.base)}))

    answers = beside.lines("generated.jsonl")
    assert [answer["input"] for answer in answers] == PROMPTS
    assert answers == merged.lines("generated.jsonl") != base.lines("generated.jsonl")


@pytest.mark.parametrize("form", FORMS)
def test_an_adapter_is_the_same_in_every_form(made, form):
    named = made.adapter(form)
    settings = parse_settings(changed(made.tuned.raw, named))
    shapes = shapes_of(settings.model, read_recipe(made.run).lora)

    factors = open_adapter(settings, shapes)

    trained = made.tuned.tensors("weights/delta.pt")
    assert set(factors) == set(trained)
    for name, factor in trained.items():
        weight = LORA["alpha"] / named["method"]["alpha"] if name.endswith("lora_B") else 1.0
        torch.testing.assert_close(factors[name], weight * factor)


@pytest.mark.parametrize("form", ["PEFT folder", "OpenDelta"])
def test_exported_adapters_evaluate_as_the_run_that_they_are_of(made, run_of, form):
    exported = finished(run_of("exported", "evaluate", made.adapter(form)))
    assert loss_of(exported) == pytest.approx(made.tuned.lines("metrics.jsonl")[-1]["eval_loss"], abs=1e-5)


@pytest.mark.parametrize("form, zero_stage, ranks", [("PEFT folder", 0, 1), ("OpenDelta", 3, 2), ("run", 0, 2)])
def test_training_starts_at_the_loss_of_the_adapter(made, run_of, form, zero_stage, ranks):
    again = run_of("again", "finetune", {**made.adapter(form), **SMALL_STEP}, ranks, zero_stage)
    merged = run_of("merged", "finetune", {**made.whole, **SMALL_STEP}, ranks, zero_stage)

    (line,) = finished(again).lines("metrics.jsonl")

    assert line["loss"] == pytest.approx(finished(merged).losses[0], abs=1e-5)
    assert line["eval_loss"] == pytest.approx(made.tuned.lines("metrics.jsonl")[-1]["eval_loss"], abs=1e-5)


def test_training_goes_on_with_the_factors_and_leaves_the_base_alone(made, run_of):
    again = finished(run_of("again", "finetune", {**made.adapter("PEFT folder"), "training.lr": 1e-2}))

    before, after = made.tuned.tensors("weights/delta.pt"), again.tensors("weights/delta.pt")
    moved = [float((after[name] - before[name]).norm() / before[name].norm()) for name in before]
    assert set(after) == set(before) and min(moved) > 0 and max(moved) < 1
    assert again.lines("metrics.jsonl")[-1]["eval_loss"] < made.tuned.lines("metrics.jsonl")[-1]["eval_loss"]


def test_a_stopped_run_resumes_from_its_checkpoint_not_from_the_adapter(made, run_of):
    constant = {**made.adapter("run"), "training.schedule": "constant"}
    straight = finished(run_of("straight", "finetune", constant))
    run = finished(run_of("run", "finetune", {**constant, "training.steps": 3}))

    run.change("training.steps", 6)

    assert finished(run).losses == straight.losses
    assert "continuing after step 3" in run.log()


@pytest.mark.parametrize("version", bmtrain_shim.VERSIONS)
def test_bmtrain_starts_where_torch_starts(made, run_of, version):
    bmtrain_shim.require(version)
    changes = {**made.adapter("PEFT folder"), "training.lr": 2e-3, "training.warmup_steps": 1}
    run = run_of("bmtrain", "finetune", {"engine": "bmtrain", **changes}, 2, 3)
    assert bmtrain_ranks.train(version, run) == [0, 0], run.log()
    torch_run = finished(run_of("torch", "finetune", changes, 2, 3))

    assert run.losses == pytest.approx(torch_run.losses, abs=2e-6)


def refusal(run: TinyRun, program=finetune) -> str:
    assert program.main([run.write_settings()]) == 2
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return run.json("errors/rank-0.json")["message"]


class TestRefusals:
    """One sentence, with the key of the job file and what is in the adapter."""

    @pytest.mark.parametrize(
        "key, value, message",
        [
            ("rank", 8, "method.lora.rank is 8, but 4 in {path}; write what the adapter has"),
            ("alpha", 8.0, "method.lora.alpha is 8, but 16 in {path}; write what the adapter has"),
            (
                "targets",
                ["project_q", "project_k"],
                "method.lora.targets are project_k, project_q, but project_q, project_v, w_0, w_out in {path}; write"
                " what the adapter has",
            ),
        ],
        ids=["rank", "alpha", "targets"],
    )
    @pytest.mark.parametrize("program", [finetune, evaluate, generate], ids=["finetune", "evaluate", "generate"])
    def test_another_method(self, made, run_of, program, key, value, message):
        task = program.__name__.rpartition(".")[2]
        run = run_of("run", task, {**made.adapter("PEFT folder"), "method": {**LORA, key: value}})
        assert refusal(run, program) == message.format(path=made.peft)

    def test_all_that_differs_is_said_at_once(self, made, run_of):
        run = run_of("run", "finetune", {**made.adapter("run"), "method": {**LORA, "rank": 2, "alpha": 2.0}})
        assert refusal(run).startswith(f"method.lora.rank is 2, but 4 in {made.run}; method.lora.alpha is 2, but 16 in")

    def test_a_file_without_alpha_is_for_that_of_cpm_9g(self, made, run_of):
        run = run_of("run", "finetune", {**made.adapter("OpenDelta"), "method": LORA})
        file = made.peft / "cpm-test-delta.pt"
        expected = f"method.lora.alpha is 16, but 64 is CPM-9G's, and {file} says none; write what the adapter has"
        assert refusal(run) == expected

    def test_an_alpha_that_is_copied_from_the_message_is_taken(self, made, tmp_path):
        """rsLoRA's has more digits than people copy."""
        shutil.copytree(made.peft, tmp_path / "rslora")
        path = tmp_path / "rslora/adapter_config.json"
        path.write_text(
            json.dumps({**json.loads(path.read_text()), "lora_alpha": 70.71067811865476, "use_rslora": True})
        )
        named = {**made.adapter("PEFT folder"), "adapter": str(path.parent)}

        def settings_with(alpha: float):
            return parse_settings(changed(made.tuned.raw, {**named, "method": {**LORA, "alpha": alpha}}))

        shapes = shapes_of(settings_with(1.0).model, read_recipe(made.run).lora)
        with pytest.raises(UserError, match="method.lora.alpha is 1, but 141.421 in"):
            open_adapter(settings_with(1.0), shapes)
        assert open_adapter(settings_with(141.421), shapes)

    def test_what_is_not_there_or_is_no_adapter(self, made, run_of, tmp_path):
        other = tmp_path / "other"
        other.mkdir()
        shutil.copy(made.peft / "adapter_model.safetensors", other / "weights.safetensors")
        wrong = {
            tmp_path / "no-delta.pt": "cannot read weights from",
            tmp_path / "no-folder": "cannot read weights from",
            made.base: "is no LoRA delta: input_embedding.weight is in it",
            other: "is no adapter of PEFT: adapter_config.json is missing",
            other / "weights.safetensors": "name the folder instead, in which adapter_config.json and",
            made.base.parents[1]: "has trained all weights, no updates: name its weights in init_from instead",
        }
        for number, (path, message) in enumerate(wrong.items()):
            run = run_of(f"run{number}", "finetune", {**made.adapter("run"), "adapter": str(path)})
            said = refusal(run)
            assert said.startswith("method.lora.init_from: ") and str(path) in said and message in said

    def test_a_run_that_has_not_finished(self, made, run_of, tmp_path):
        unfinished = tmp_path / "unfinished"
        shutil.copytree(made.run, unfinished)
        (unfinished / "outcome.json").unlink()
        run = run_of("run", "finetune", {**made.adapter("run"), "adapter": str(unfinished)})
        said = refusal(run)
        assert said.startswith(f"method.lora.init_from: {unfinished} has not finished")
        assert "cpm export --format lora" in said

    @pytest.mark.parametrize(
        "change, message",
        [
            ({"0.self_att.self_attention.project_q.lora.lora_A": torch.zeros(4, 31)}, "[4, 31] instead of [4, 32]"),
            ({"0.self_att.self_attention.project_q.lora.lora_A": torch.zeros(8, 32)}, "have ranks [4, 8]"),
            ({"0.self_att.self_attention.project_q.lora.lora_A": torch.zeros(())}, "have ranks [0, 4]"),
            ({"1.self_att.self_attention.project_q.lora.lora_A": None}, "project_q.lora.lora_A is missing"),
            ({"2.self_att.self_attention.project_q.lora.lora_A": torch.zeros(4, 32)}, "lora_A is unknown"),
        ],
        ids=["shape", "rank of a layer", "no matrix", "fewer layers", "more layers"],
    )
    def test_factors_that_the_model_does_not_have(self, made, run_of, tmp_path, change, message):
        factors = torch.load(made.peft / "cpm-test-delta.pt", weights_only=True)
        factors.update({f"encoder.layers.{name}": factor for name, factor in change.items()})
        torch.save({name: factor for name, factor in factors.items() if factor is not None}, tmp_path / "x-delta.pt")
        adapter = {**made.adapter("OpenDelta"), "adapter": str(tmp_path / "x-delta.pt")}
        said = refusal(run_of("run", "finetune", adapter))
        assert said.startswith("method.lora.init_from: ") and message in said

    def test_ranks_of_bmtrain_end_together(self, made, run_of):
        bmtrain_shim.require(bmtrain_shim.VERSIONS[-1])
        changes = {**made.adapter("run"), "engine": "bmtrain", "method": {**LORA, "rank": 8}}
        run = run_of("run", "finetune", changes, 2, 3)
        assert bmtrain_ranks.train(bmtrain_shim.VERSIONS[-1], run) == [2, 2]
        assert run.json("errors/rank-0.json")["message"].startswith("method.lora.rank is 8, but 4 in")
        assert "rank 0 cannot use" in run.json("errors/rank-1.json")["message"]
