"""A run as its user sees it: two gloo ranks on loopback, files in the run directory, exit codes."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_ranks import finish, wait_for

from cpm_cluster.training.engines.sharded_state import read_index
from cpm_cluster.training.export import Wanted, export

pytestmark = pytest.mark.timeout(90)


def assert_same_tensors(left: dict, right: dict) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def test_a_finished_run_leaves_everything_that_the_contract_names(tiny_run):
    run = tiny_run(**{"training.steps": 12, "training.checkpoint.every": 4})

    assert run.train() == [0, 0], run.log()

    assert run.json("outcome.json") == {
        "outcome": "finished",
        "step": 12,
        "checkpoint_step": 12,
        "final_loss": run.losses[-1],
    }
    progress = run.json("progress.json")
    assert (progress["phase"], progress["step"], progress["world_size"]) == ("done", 12, 2)
    assert progress["checkpoint_step"] == 12 and progress["eta_seconds"] == 0.0
    metrics = run.lines("metrics.jsonl")
    assert [line["step"] for line in metrics] == list(range(1, 13))
    assert [line["step"] for line in metrics if line["eval_loss"] is not None] == [3, 6, 9, 12]
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.5
    assert metrics[-1]["eval_loss"] < metrics[2]["eval_loss"]
    assert [sample["step"] for sample in run.lines("samples.jsonl")] == [0, 12]
    kept = sorted(path.name for path in (run.directory / "checkpoints").iterdir())
    assert kept == ["latest", "step-00000008", "step-00000012"]
    assert (run.directory / "checkpoints/latest").read_text() == "step-00000012\n"
    assert not (run.directory / "errors").exists()
    assert list(run.directory.rglob("*.tmp")) == []


def test_final_weights_have_the_names_of_cpm_9g_and_can_be_tuned_further(tiny_run):
    first = tiny_run("first")
    assert first.train() == [0, 0]
    weights = first.tensors("weights/model.pt")
    assert "encoder.layers.1.self_att.self_attention.project_q.weight" in weights

    second = tiny_run("second", init_from=str(first.directory / "weights/model.pt"))
    assert second.train() == [0, 0]

    assert second.losses[0] < first.losses[0] - 0.3


def test_tensorboard_draws_each_step_once_even_after_a_resume(tiny_run):
    run = tiny_run(**{"training.steps": 6, "training.checkpoint.every": 2})
    assert run.train() == [0, 0]
    # The run died after step 6, its newest whole checkpoint is step 4.
    (run.directory / "checkpoints/step-00000006/__0_0.distcp").write_bytes(b"torn")

    assert run.train() == [0, 0]

    events = EventAccumulator(str(run.directory / "tb")).Reload()
    assert [event.step for event in events.Scalars("loss/train")] == [1, 2, 3, 4, 5, 6]
    assert [event.value for event in events.Scalars("loss/train")] == pytest.approx(run.losses)
    expected = {"loss/eval", "optimizer/lr", "optimizer/grad_norm", "speed/tokens_per_second"}
    assert expected <= set(events.Tags()["scalars"])
    assert any(tag.startswith("samples/0") for tag in events.Tags()["tensors"])


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_a_stopped_and_resumed_run_ends_bit_for_bit_like_a_straight_one(tiny_run, zero_stage):
    lora = {"kind": "lora", "rank": 4, "alpha": 8, "dropout": 0.3, "targets": ["project_q", "w_out"]}
    changes = {"method": lora, "training.zero_stage": zero_stage}
    straight, halved = tiny_run("straight", **changes), tiny_run("halved", **changes)
    assert straight.train() == [0, 0], straight.log()

    assert halved.train() == [0, 0]
    damaged = halved.directory / "checkpoints/step-00000006/__1_0.distcp"
    damaged.write_bytes(damaged.read_bytes()[:-7])
    assert halved.train() == [0, 0], halved.log()

    assert "step-00000006 is not used: __1_0.distcp is not what was written" in halved.log()
    assert halved.losses == straight.losses
    assert_same_tensors(halved.tensors("weights/delta.pt"), straight.tensors("weights/delta.pt"))


def test_a_lora_checkpoint_holds_the_delta_alone(tiny_run):
    lora = {"kind": "lora", "rank": 2, "alpha": 4, "dropout": 0.0, "targets": ["project_v"]}
    run = tiny_run(method=lora)

    assert run.train() == [0, 0]

    layer = "encoder.layers.{}.self_att.self_attention.project_v.lora.lora_{}"
    expected = {layer.format(number, factor) for number in (0, 1) for factor in "AB"}
    saved = read_index(run.directory / "checkpoints/step-00000006").state_dict_metadata
    assert {name[len("model.") :] for name in saved if name.startswith("model.")} == expected
    assert set(run.tensors("weights/delta.pt")) == expected
    assert run.losses[-1] < run.losses[0]


def test_no_evaluation_and_no_clipping_are_settings_too(tiny_run):
    run, clipped = tiny_run("run", **{"training.eval_every": 0, "training.clip_grad_norm": 0}), tiny_run("clipped")
    clipped.change("training.clip_grad_norm", 0.01)
    vast = tiny_run("vast", **{"training.clip_grad_norm": 1e30})

    assert run.train() == clipped.train() == vast.train() == [0, 0]

    assert [line["eval_loss"] for line in run.lines("metrics.jsonl")] == [None] * 6
    assert "eval_loss" not in run.log()
    assert run.losses == vast.losses != clipped.losses
    assert run.lines("metrics.jsonl")[0]["grad_norm"] > 0.01


def test_a_merged_delta_evaluates_like_the_tuned_model(tiny_run):
    lora = {"kind": "lora", "rank": 4, "alpha": 8, "dropout": 0.0, "targets": ["project_q", "w_0", "w_out"]}
    base = tiny_run("base")
    assert base.train() == [0, 0]
    weights = str(base.directory / "weights/model.pt")
    tuned = tiny_run("tuned", method=lora, init_from=weights)
    assert tuned.train() == [0, 0]

    merged = str(tuned.directory / "merged")
    export(Wanted(tuned.directory, "hf", Path(merged), True, None, None, False), Path, lambda *progress: None)
    # One step at a rate of nearly nothing: its evaluation is that of the merged weights.
    checked = tiny_run("checked", init_from=merged, **{"training.steps": 1, "training.lr": 1e-12})
    checked.change("training.warmup_steps", 0)
    assert checked.train() == [0, 0]

    (line,) = checked.lines("metrics.jsonl")
    assert line["eval_loss"] == pytest.approx(tuned.lines("metrics.jsonl")[-1]["eval_loss"], abs=1e-5)
    assert line["eval_loss"] < base.lines("metrics.jsonl")[-1]["eval_loss"] - 0.01


def test_the_result_does_not_depend_on_how_the_batch_is_divided(tiny_run):
    two_ranks = tiny_run("two_ranks")
    one_rank = tiny_run("one_rank", **{"training.grad_accum": 2, "expected_world_size": 1})
    sharded = tiny_run("sharded", **{"training.zero_stage": 3})
    recomputed = tiny_run("recomputed", **{"training.recompute": "full"})

    assert two_ranks.train() == [0, 0]
    assert one_rank.train(world_size=1) == [0]
    assert sharded.train() == [0, 0], sharded.log()
    assert recomputed.train() == [0, 0]

    for other in (one_rank, sharded, recomputed):
        assert other.losses == pytest.approx(two_ranks.losses, abs=2e-4)
        last, reference = other.lines("metrics.jsonl")[-1], two_ranks.lines("metrics.jsonl")[-1]
        assert last["tokens_seen"] == reference["tokens_seen"]
        assert last["eval_loss"] == pytest.approx(reference["eval_loss"], abs=2e-4)


def test_a_checkpoint_can_be_continued_on_another_number_of_ranks_and_with_other_sharding(tiny_run):
    run = tiny_run(**{"training.steps": 6, "training.zero_stage": 3})
    assert run.train() == [0, 0]
    straight = run.losses
    (run.directory / "checkpoints/step-00000006/manifest.json").unlink()

    run.change("training.zero_stage", 0)
    run.change("training.grad_accum", 2)
    assert run.train(world_size=1, expected_world_size=1) == [0], run.log()

    assert run.losses == pytest.approx(straight, abs=2e-4)


def test_bf16_trains_to_nearly_the_same_loss(tiny_run):
    exact, half = tiny_run("exact"), tiny_run("half", **{"training.precision": "bf16"})
    sharded = tiny_run("sharded", **{"training.precision": "bf16", "training.zero_stage": 3})

    assert exact.train() == half.train() == sharded.train() == [0, 0]

    assert half.losses == pytest.approx(exact.losses, abs=0.05)
    assert sharded.losses == pytest.approx(exact.losses, abs=0.05)
    assert half.losses != exact.losses


def test_equal_seeds_give_equal_runs_and_other_seeds_other_runs(tiny_run):
    first, second, other = tiny_run("first"), tiny_run("second"), tiny_run("other", seed=8)

    assert first.train() == second.train() == other.train() == [0, 0]

    assert first.losses == second.losses != other.losses
    assert first.lines("samples.jsonl") == second.lines("samples.jsonl")


@pytest.mark.parametrize("how", ["file", "SIGUSR2", "SIGTERM"])
def test_a_stop_request_saves_at_the_next_step_and_the_run_can_go_on(tiny_run, how):
    run = tiny_run(**{"training.steps": 100_000, "training.checkpoint.every": 100_000})
    ranks = run.start()
    wait_for(lambda: run.steps_recorded > 2)

    if how == "file":
        run.ask_to_stop()
    else:
        os.kill(ranks[1].pid, signal.Signals[how])
    assert finish(ranks) == [85, 85], run.log()

    outcome = run.json("outcome.json")
    assert outcome["outcome"] == "stopped" and outcome["checkpoint_step"] == outcome["step"] > 2
    assert run.json("progress.json")["phase"] == "stopped"
    if how == "file":
        run.withdraw_stop()
    run.change("training.steps", outcome["step"] + 2)
    run.change("training.warmup_steps", 0)
    assert run.train() == [0, 0], run.log()
    assert [line["step"] for line in run.lines("metrics.jsonl")] == list(range(1, outcome["step"] + 3))


def test_under_torchrun_a_stop_is_no_failure(tiny_run):
    run = tiny_run()
    run.ask_to_stop()

    assert run.train(torchrun=True) == [0, 0]

    assert run.json("outcome.json")["outcome"] == "stopped"


def test_ranks_that_do_not_form_the_planned_group_refuse_to_train(tiny_run):
    run = tiny_run(expected_world_size=2)

    assert run.train(world_size=1) == [2]

    error = run.json("errors/rank-0.json")
    assert error["user_error"] is True and error["type"] == "UserError" and error["rank"] == 0
    assert "planned for 2 rank(s) but WORLD_SIZE is 1" in error["message"]
    assert run.log().count("\n") == 1 and "Traceback" not in run.log()
    assert run.json("progress.json")["phase"] == "failed"
    assert not (run.directory / "metrics.jsonl").exists()


def test_bad_data_are_named_by_line_before_the_first_step(tiny_run):
    run = tiny_run()
    bad = run.directory / "bad.jsonl"
    bad.write_text('{"input": "", "output": "fine"}\n{"input": 3, "output": "x"}\nnonsense\n{"input": ""}\n')
    run.change("data.train", [{"path": str(bad), "weight": None}])

    assert run.train() == [2, 2]

    message = run.json("errors/rank-1.json")["message"]
    assert f'{bad}:2: "input" is not a text' in message
    assert f"{bad}:3: is not JSON" in message
    assert f'{bad}:4: has no "output"' in message


def test_patterns_and_weighted_sources_are_resumed_on_another_number_of_ranks(tiny_run):
    sources = {}
    for name in ("straight", "halved"):
        run = sources[name] = tiny_run(name, task="pretrain", **{"training.steps": 8, "training.checkpoint.every": 4})
        (run.directory / "few.jsonl").write_text(json.dumps({"input": "", "output": "a long one " * 20}) + "\n")
        (run.directory / "data.jsonl").write_text(
            "".join(json.dumps({"input": "", "output": f"text {number}"}) + "\n" for number in range(30))
        )
        patterns = [{"path": str(run.directory / "d*.jsonl"), "weight": 3.0}]
        run.change("data.train", [*patterns, {"path": str(run.directory / "few.jsonl"), "weight": 1.0}])
        run.change("data.eval", [{"path": str(run.directory / "[df]*.jsonl"), "weight": None}])
    straight, halved = sources["straight"], sources["halved"]
    assert straight.train() == [0, 0], straight.log()

    assert halved.train() == [0, 0]
    (halved.directory / "checkpoints/step-00000008/manifest.json").unlink()
    halved.change("training.grad_accum", 2)
    assert halved.train(world_size=1, expected_world_size=1) == [0], halved.log()

    assert halved.losses == pytest.approx(straight.losses, abs=2e-4)
    assert halved.lines("metrics.jsonl")[-1]["tokens_seen"] == straight.lines("metrics.jsonl")[-1]["tokens_seen"]
    assert "train data: 35 samples" in straight.log()
    assert straight.lines("metrics.jsonl")[-1]["epoch"] >= 2


def test_a_run_does_not_go_on_with_other_data(tiny_run):
    run = tiny_run()
    assert run.train() == [0, 0]
    with open(run.directory / "data.jsonl", "a") as file:
        file.write(json.dumps({"input": "", "output": "one more"}) + "\n")

    assert run.train() == [2, 2]

    assert "the training data (files, weights, tokenizer, seq_len or seed) are not those of the checkpoint" in run.log()


def test_an_unexpected_error_keeps_its_traceback_and_place(tiny_run):
    run = tiny_run(**{"training.lr": 1e30, "training.warmup_steps": 0, "training.clip_grad_norm": 1e30})

    assert run.train() == [1, 1]

    error = run.json("errors/rank-0.json")
    assert error["type"] == "FloatingPointError" and error["user_error"] is False
    assert error["file"].endswith("guard.py") and error["line"] > 0
    assert "Traceback" in run.log()


def test_fp16_without_a_gpu_is_refused_in_one_sentence(tiny_run):
    run = tiny_run(**{"training.precision": "fp16"})

    assert run.train() == [2, 2]

    assert "precision fp16 needs a GPU" in run.log()


def test_a_checkpoint_of_another_model_is_not_taken_for_this_one(tiny_run):
    run = tiny_run()
    assert run.train() == [0, 0]
    run.change("model.ffn", 64)

    assert run.train() == [2, 2]

    assert "was written with another model; use a new output_dir" in run.log()


def test_ranks_without_data_of_their_own_do_not_hang(tiny_run):
    run = tiny_run()
    (run.directory / "data.jsonl").write_text(json.dumps({"input": "", "output": "one row"}) + "\n")

    assert run.train() == [0, 0], run.log()

    assert run.losses[-1] < run.losses[0]
