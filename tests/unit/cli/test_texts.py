"""One line on where a run stands, and the summary at its end."""

from __future__ import annotations

import json

import pytest

from cpm_cluster.cli.progress_line import measures, progress_line
from cpm_cluster.cli.summary import summary
from cpm_cluster.diagnosis.verdict import Verdict
from cpm_cluster.runs.state import read_state

WHOLE = {
    "phase": "training",
    "step": 40,
    "steps": 150,
    "loss": 5.2104,
    "eval_loss": 5.4,
    "tokens_per_second": 9120.4,
    "eta_seconds": 65.2,
    "checkpoint_step": 30,
}


def test_all_that_is_known_of_a_run():
    expected = "step 40/150 · loss 5.210 · eval 5.400 · 9,120 tokens/s · 1 min 5 s left · checkpoint of step 30"
    assert progress_line(WHOLE) == expected


@pytest.mark.parametrize("key", ["loss", "eval_loss", "tokens_per_second", "eta_seconds", "checkpoint_step"])
def test_what_is_not_known_is_left_out(key):
    for unknown in ({**WHOLE, key: None}, {k: v for k, v in WHOLE.items() if k != key}):
        assert len(measures(unknown)) == 4
        assert "None" not in progress_line(unknown)


def test_utilisation_and_what_the_loss_guard_did_are_told():
    parts = measures({**WHOLE, "mfu": 0.413, "guard_events": 2})

    assert "MFU 41%" in parts and "guard 2×" in parts
    assert len(measures({**WHOLE, "mfu": None, "guard_events": 0})) == 5


def test_a_run_that_has_said_nothing_yet():
    assert progress_line({}) == "step 0/?"


@pytest.mark.parametrize(
    ("phase", "shown"), [("training", True), ("saving", True), ("sampling", False), ("done", False)]
)
def test_the_time_left_is_that_of_the_training(phase, shown):
    assert ("left" in progress_line({**WHOLE, "phase": phase})) is shown


def summary_of(made, verdict=None):
    return summary(made.run, read_state(made.run, alive=False), verdict)


def metrics(*losses):
    rows = [{"step": step, "loss": loss, "eval_loss": None} for step, loss in enumerate(losses, 1)]
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def finished(made_run):
    return made_run().submitted().phase("training").exited(0)


def test_the_summary_of_a_training(finished):
    finished.file("metrics.jsonl", metrics(*[8 - n / 50 for n in range(300)])).file("progress.json", WHOLE)
    finished.file("tb/events", "").file("weights/model", "")
    text = summary_of(finished)
    curve = [line for line in text.splitlines() if "█" in line]
    assert [line.split()[0] for line in curve][:1] + [curve[-1].split()[0]] == ["1", "300"]
    assert len(curve) == 12
    assert curve[0].count("█") == 40 and 10 <= curve[-1].count("█") <= 11
    root = finished.run.files.root
    for expected in (
        f"{finished.run.id}: finished\n",
        progress_line(WHOLE),
        f"run directory:  {root}\n",
        f"cpm logs {finished.run.id}",
        f"tensorboard --logdir {root}/tb",
        f"weights:        {root}/weights",
    ):
        assert expected in text


def test_evaluations_stand_beside_the_curve(finished):
    rows = [{"step": n, "loss": 2.0, "eval_loss": 3.21 if n == 2 else None} for n in (1, 2)]
    finished.file("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert "eval 3.210" in summary_of(finished)


@pytest.mark.parametrize("losses", [(), (5.0,), (0.0, 0.0), (1e-9, 1e9)])
def test_curves_of_any_shape(finished, losses):
    text = summary_of(finished.file("metrics.jsonl", metrics(*losses)))
    assert text.count("█") == 0 if len(losses) < 2 else text.count("█") >= 2


def test_a_torn_last_line_of_the_metrics(finished):
    finished.file("metrics.jsonl", metrics(3.0, 2.0) + '{"step": 3, "lo')
    assert "2.000" in summary_of(finished)


def test_samples_before_and_after_whatever_the_model_says(finished):
    texts = ["\u2028\x85\x1b[31m}\n{", "plain"]
    rows = [{"step": step, "prompt": "a prompt", "text": text} for step, text in zip((0, 9), texts, strict=True)]
    finished.file("samples.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    text = summary_of(finished)
    assert "prompt: a prompt\n  before:\n    \\u2028\\x85\\x1b[31m}\\n{\n  after 9 steps:\n    plain\n" in text


def test_the_summary_of_a_failure_says_what_to_do(made_run):
    made = made_run(trainer=False).submitted().phase("training").exited(7)
    text = summary_of(made, Verdict("program", "It broke.", False, "mend it"))
    assert f"{made.run.id}: failed (exit code 7)\n  It broke.\n  what to do: mend it\n" in text
    assert "log of rank" not in text and "tensorboard" not in text


@pytest.mark.parametrize("name", ["samples.jsonl", "metrics.jsonl", "fit.json", "telemetry/n1.jsonl"])
@pytest.mark.parametrize("content", ['{"prompt": 1, "loss": "low", "demands": 4, "kind": "x"}', "[]", "[" * 100_000])
def test_a_damaged_record_costs_its_own_lines_alone(finished, name, content):
    text = summary_of(finished.file(name, content + "\n"))
    assert f"{finished.run.id}: finished" in text and "run directory:" in text
