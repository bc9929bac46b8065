"""The loss guard: what it lets through, and what becomes of a run that meets bad data."""

from __future__ import annotations

import json
import math

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch_here import require_torch_for

from cpm_cluster.training.checkpoint import CheckpointError, Checkpoints
from cpm_cluster.training.engines.torch_engine import TorchEngine
from cpm_cluster.training.guard import LossGuard
from cpm_cluster.training.placement import Placement
from cpm_cluster.training.run import train
from cpm_cluster.training.settings import GuardSettings
from cpm_cluster.training.settings_file import parse_settings

POISON = ord("Z") + 3  # the id of a byte, after three special tokens
HONEST = TorchEngine._summed_loss
ONE_RANK = {"expected_world_size": 1, "training.micro_batch": 1, "training.schedule": "constant"}
GUARD = {"nonfinite": "stop", "spike": "ignore", "spike_deviations": 4.0, "window": 4, "limit": 3}


def guard(**changes) -> LossGuard:
    return LossGuard(GuardSettings(**{**GUARD, **changes}))


def judge(loss_guard: LossGuard, losses: list[float], first: int = 1) -> list[bool]:
    return [loss_guard.accept(step, loss, 1.0) for step, loss in enumerate(losses, first)]


def test_a_spike_is_measured_by_the_last_accepted_losses():
    watching = guard(spike="skip")

    assert judge(watching, [9.0, 2.1, 1.9, 2.1, 1.9]) == [True] * 5  # nothing is a spike before the window is full
    assert not watching.accept(6, 2.5, 1.0)  # the mean is 2.0, the deviation 0.1
    assert watching.take_incident() == (
        6,
        "spike",
        "skip",
        "the loss of step 6 is 2.5000, after 2.0000 ± 0.1000 in the 4 steps before: left out (1 of 3)",
    )
    assert watching.take_incident() is None
    assert watching.accept(7, 2.39, 1.0) and not watching.accept(8, 3.3, 1.0)
    assert watching.incidents == 2


def test_equal_losses_have_a_little_spread_all_the_same():
    watching = guard(spike="skip")

    assert judge(watching, [2.0, 2.0, 2.0, 2.0, 2.007, 2.02]) == [True] * 5 + [False]


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (2.0, math.nan), (2.0, math.inf)])
def test_what_is_no_number_ends_the_run_or_is_left_out_so_many_times(loss, norm):
    with pytest.raises(FloatingPointError, match="of step 5 is (nan|inf)"):
        guard().accept(5, loss, norm)

    patient = guard(nonfinite="skip")
    assert [patient.accept(step, loss, norm) for step in (5, 6, 7)] == [False] * 3
    with pytest.raises(FloatingPointError, match=r"step 8 is .* after 3 such steps already \(training.guard.limit\)"):
        patient.accept(8, loss, norm)


def test_a_guard_that_was_saved_judges_like_the_one_before():
    before = guard(spike="skip", nonfinite="skip")
    judge(before, [2.0, 2.1, 1.9, 2.0, 9.0, math.nan])
    after = guard(spike="skip", nonfinite="skip")

    after.restore(json.loads(json.dumps(before.state())))

    assert after.incidents == before.incidents == 2
    assert judge(after, [2.4, 2.1, 9.0], 7) == judge(before, [2.4, 2.1, 9.0], 7)
    assert after.state() == before.state()


class PoisonedRun:
    """A run of this process, whose loss is ``badness`` times what it should be on a row with a Z."""

    def __init__(self, tiny_run, monkeypatch, name: str, badness: float, **changes) -> None:
        self.files = tiny_run(name, **{**ONE_RANK, **changes})
        rows = [{"input": "", "output": f"the cat sat on the mat number {n} and sat"} for n in range(7)]
        rows.append({"input": "", "output": "Z is what nobody should have written here"})
        (self.files.directory / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.seen: list[bool] = []
        self.crash_at = -1

        def poisoned(engine, batch):
            loss = HONEST(engine, batch)
            if not torch.is_grad_enabled():
                return loss
            self.seen.append(bool((batch.input_ids == POISON).any()))
            if len(self.seen) == self.crash_at:
                raise KeyboardInterrupt
            return loss * badness if self.seen[-1] else loss

        self.poison = lambda: monkeypatch.setattr(TorchEngine, "_summed_loss", poisoned)

    def train(self) -> str:
        """Run to the end; return the outcome."""
        require_torch_for(self.files.raw)
        self.poison()
        try:
            return train(parse_settings(self.files.raw), Placement(0, 1, 0), b"")
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()

    @property
    def events(self) -> list[dict]:
        return [{**event, "time": 0} for event in self.files.lines("events/trainer.jsonl")]

    @property
    def board(self) -> EventAccumulator:
        return EventAccumulator(str(self.files.directory / "tb")).Reload()


@pytest.fixture
def poisoned(tiny_run, monkeypatch):
    return lambda name, badness, **changes: PoisonedRun(tiny_run, monkeypatch, name, badness, **changes)


def test_a_step_without_a_number_is_left_out_and_told_everywhere(poisoned, capsys):
    changes = {"training.steps": 9, "training.log_every": 3}
    run = poisoned("run", math.nan, **{**changes, "training.guard.nonfinite": "skip", "training.eval_every": 0})

    assert run.train() == "finished"

    (step,) = [number for number, is_bad in enumerate(run.seen, 1) if is_bad]
    text = f"the loss of step {step} is nan: left out (1 of 10)"
    lines = {line["step"]: line for line in run.files.lines("metrics.jsonl")}
    assert set(lines) == {3, 6, 9, step} and lines[step]["loss"] is None and lines[step]["events"] == [text]
    assert lines[9]["guard_events"] == 1 and math.isfinite(lines[9]["loss"])
    assert f"guard: {text}" in capsys.readouterr().out
    assert [(event["kind"], event["step"], event["text"]) for event in run.events] == [("guard", step, text)]
    assert run.files.json("progress.json")["guard_events"] == 1
    assert run.files.json("progress.json")["last_event"] == text
    assert run.board.Scalars("guard/events")[-1].value == 1
    assert any(tag.startswith("guard/event") for tag in run.board.Tags()["tensors"])
    assert all(weight.isfinite().all() for weight in run.files.tensors("weights/model.pt").values())


def test_a_rollback_returns_to_the_checkpoint_and_reads_on_after_the_bad_data(poisoned):
    changes = {"training.steps": 14, "training.checkpoint.every": 4, "training.guard.nonfinite": "rollback"}
    run = poisoned("run", math.nan, **changes)

    assert run.train() == "finished"

    metrics = run.files.lines("metrics.jsonl")
    assert [line["step"] for line in metrics] == list(range(1, 15))
    assert [event.step for event in run.board.Scalars("loss/train")] == list(range(1, 15))
    assert sum(run.seen) == len(run.events) == metrics[-1]["guard_events"] >= 1
    for event in run.events:
        assert event["rolled_back_to"] == (event["step"] - 1) // 4 * 4
    # Each row was read once an epoch: nothing of what led to the bad row was read again.
    assert [sum(run.seen[start : start + 8]) for start in range(0, len(run.seen) - 7, 8)] == [1] * (len(run.seen) // 8)
    assert len(run.seen) == 14 + sum(event["step"] - event["rolled_back_to"] for event in run.events)


def test_a_rollback_without_a_whole_checkpoint_ends_the_run(poisoned, monkeypatch):
    run = poisoned("run", math.nan, **{"training.steps": 14, "training.guard.nonfinite": "rollback"})
    monkeypatch.setattr(Checkpoints, "_newest_whole", lambda checkpoints, engine: None)

    with pytest.raises(CheckpointError, match=r"^the loss of step \d+ is nan.*no checkpoint is whole any more"):
        run.train()


@pytest.mark.parametrize("action", ["skip", "rollback"])
def test_a_run_that_crashed_meets_the_same_incidents_and_ends_bit_for_bit_alike(poisoned, action):
    changes = {"training.steps": 14, "training.checkpoint.every": 4, "training.guard.window": 2}
    changes.update({"training.guard.spike": action, "training.guard.spike_deviations": 5.0})
    straight = poisoned("straight", 9.0, **changes)
    assert straight.train() == "finished"
    assert {event["cause"] for event in straight.events} == {"spike"}

    crashed = poisoned("crashed", 9.0, **changes)
    crashed.crash_at = straight.events[0]["step"] + 2
    with pytest.raises(KeyboardInterrupt):
        crashed.train()
    assert crashed.train() == "finished"

    assert crashed.files.losses == straight.files.losses
    weights, expected = crashed.files.tensors("weights/model.pt"), straight.files.tensors("weights/model.pt")
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert crashed.files.lines("metrics.jsonl")[-1]["guard_events"] == len(straight.events)


def test_a_run_whose_weights_are_lost_ends_in_one_sentence(poisoned):
    run = poisoned("run", 1.0, **{"training.guard.nonfinite": "skip", "training.guard.limit": 2})
    run.files.change("training.lr", 1e30)
    run.files.change("training.warmup_steps", 0)
    run.files.change("training.clip_grad_norm", 1e30)

    with pytest.raises(FloatingPointError, match=r"^the gradient norm of step 4 is nan.*, after 2 such steps already"):
        run.train()

    assert [event["step"] for event in run.events] == [2, 3]


@pytest.mark.timeout(90)
@pytest.mark.parametrize("zero_stage", [0, 3])
def test_ranks_roll_back_together(tiny_run, zero_stage):
    changes = {"training.steps": 20, "training.micro_batch": 1, "training.zero_stage": zero_stage}
    changes.update({"training.checkpoint.asynchronous": True, "training.eval_every": 0, "training.log_every": 5})
    changes.update({"training.guard.spike": "rollback", "training.guard.window": 4})
    run = tiny_run(**changes, **{"training.guard.spike_deviations": 8.0, "training.schedule": "constant"})
    rows = ["the cat sat on the mat, the dog sat on the mat"] * 15 + ["~#{}|^$@&*=+<>;:?%!/~#{}|^$@&*=+<>;:?%!/~#{}|"]
    text = "".join(json.dumps({"input": "", "output": row}) + "\n" for row in rows)
    (run.directory / "data.jsonl").write_text(text)

    assert run.train() == [0, 0], run.log()

    events = run.lines("events/trainer.jsonl")
    assert {(event["cause"], event["action"]) for event in events} == {("spike", "rollback")}
    assert all(event["rolled_back_to"] % 3 == 0 for event in events)
    assert [line["step"] for line in run.lines("metrics.jsonl")] == [5, 10, 15, 20]
    assert run.json("outcome.json")["step"] == 20 and run.losses[-1] < 2
