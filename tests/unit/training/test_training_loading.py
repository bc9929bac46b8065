"""Runs that are asked to stop while they read their data, and the evaluation of several sources."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest
import torch
from data_faults import SlowEncoding
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import ROWS, source
from training_ranks import finish, start_ranks, wait_for

from cpm_cluster.training.model.decoder import CPM
from cpm_cluster.training.settings_file import parse_settings

pytestmark = pytest.mark.timeout(90)


def with_text(run, count: int = 2000):
    """Give a run so many rows, which SlowEncoding makes minutes of."""
    rows = [{"input": "", "output": f"row {number}"} for number in range(count)]
    (run.directory / "many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run.change("data.train", [source(run.directory / "many.jsonl")])
    return run


def encoded(run, use: str) -> dict[str, int]:
    """When each part of the data was written."""
    found = (run.directory / "index").glob(f"{use}-*/part-*.json")
    return {path.name: path.stat().st_mtime_ns for path in found}


@pytest.mark.parametrize("how", ["file", "SIGUSR2", "SIGTERM"])
def test_a_run_that_reads_its_data_stops_within_seconds_and_goes_on_with_what_is_encoded(tiny_run, how):
    run = with_text(tiny_run())
    ranks = start_ranks(run.write_settings(), 2, run.directory, prepare=SlowEncoding(0.3))
    wait_for(lambda: len(encoded(run, "train")) >= 3)

    asked = time.monotonic()
    if how == "file":
        run.ask_to_stop()
    else:
        os.kill(ranks[1].pid, signal.Signals[how])
    assert finish(ranks) == [85, 85], run.log()

    assert time.monotonic() - asked < 10
    assert run.json("outcome.json") == {"outcome": "stopped", "step": 0, "checkpoint_step": None, "final_loss": None}
    assert run.json("progress.json")["phase"] == "stopped"
    assert {run.json(f"heartbeats/rank-{rank}.json")["ended"] for rank in (0, 1)} == {"stopped"}
    assert not list((run.directory / "errors").glob("*"))
    if how == "file":
        run.withdraw_stop()
    before = encoded(run, "train")
    assert finish(start_ranks(run.write_settings(), 2, run.directory, prepare=SlowEncoding(0))) == [0, 0], run.log()
    after = encoded(run, "train")
    assert len(before) < len(after) and {name: after[name] for name in before} == before
    assert "train data: 2000 samples" in run.log()


def test_a_run_that_is_stopped_while_it_reads_changed_settings_keeps_its_checkpoint(tiny_run):
    run = with_text(tiny_run())
    parts_of_a_kilobyte = SlowEncoding(0)
    assert finish(start_ranks(run.write_settings(), 2, run.directory, prepare=parts_of_a_kilobyte)) == [0, 0]
    many = run.directory / "many.jsonl"
    os.utime(many)
    ranks = start_ranks(run.write_settings(), 2, run.directory, prepare=SlowEncoding(0.3))
    wait_for(lambda: "loading data" in (run.directory / "progress.json").read_text())

    os.kill(ranks[0].pid, signal.SIGTERM)
    assert finish(ranks) == [85, 85], run.log()

    outcome = run.json("outcome.json")
    assert (outcome["step"], outcome["checkpoint_step"]) == (6, 6)
    assert run.json("progress.json")["checkpoint_step"] == 6
    run.change("training.steps", 8)
    assert finish(start_ranks(run.write_settings(), 2, run.directory, prepare=parts_of_a_kilobyte)) == [0, 0]
    assert [line["step"] for line in run.lines("metrics.jsonl")] == list(range(1, 9))


def test_an_evaluation_stops_while_it_reads_its_data(tiny_run, tmp_path):
    run = tiny_run(task="evaluate", init_from=str(tmp_path / "weights.pt"))
    run.change("data.eval", with_text(run).raw["data"]["train"])
    torch.save(CPM(parse_settings(run.raw).model).state_dict(), tmp_path / "weights.pt")
    ranks = start_ranks(run.write_settings(), 2, run.directory, prepare=SlowEncoding(0.3))
    wait_for(lambda: len(encoded(run, "eval")) >= 3)

    os.kill(ranks[1].pid, signal.SIGUSR2)

    assert finish(ranks, 20) == [85, 85], run.log()
    assert run.json("outcome.json")["outcome"] == "stopped"
    assert not (run.directory / "evaluation.json").exists()


def test_the_loss_of_each_source_is_reported_and_that_of_all_is_of_their_tokens_together(tiny_run):
    together, apart = tiny_run("together"), tiny_run("apart")
    parts = {"some": ROWS[:2], "others": ROWS[2:]}
    for name, rows in parts.items():
        (apart.directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    apart.change("data.eval", [source(apart.directory / f"{name}.jsonl") for name in parts])

    assert together.train() == [0, 0], together.log()
    assert apart.train() == [0, 0], apart.log()

    last = apart.lines("metrics.jsonl")[-1]
    assert last["eval_loss"] == pytest.approx(together.lines("metrics.jsonl")[-1]["eval_loss"], abs=1e-5)
    assert set(last["eval_losses"]) == {"some", "others"}
    assert min(last["eval_losses"].values()) < last["eval_loss"] < max(last["eval_losses"].values())
    assert together.lines("metrics.jsonl")[-1]["eval_losses"] == {}
    board = EventAccumulator(str(apart.directory / "tb")).Reload()
    (*_, newest) = board.Scalars("loss/eval/others")
    assert newest.value == pytest.approx(last["eval_losses"]["others"], abs=1e-5)
