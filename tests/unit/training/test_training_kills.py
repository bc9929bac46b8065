"""Whatever befalls a run, it goes on to the bit: killed anywhere, on a slow or a full disk, on other ranks."""

from __future__ import annotations

import random
import signal

import pytest
import torch
from checkpoint_faults import ONLY_RANK_0, POINTS, FullDisk, Killed, SlowDisk
from training_ranks import finish, start_ranks

from cpm_cluster.training.checkpoint import damage_of

pytestmark = pytest.mark.timeout(120)

LORA = {"kind": "lora", "rank": 1, "alpha": 8, "dropout": 0.3, "targets": ["project_q", "w_out"]}
QUIET = {"training.eval_every": 0, "samples.prompts": []}
CASES = {
    "ddp-full": {"training.zero_stage": 0},
    "ddp-lora": {"training.zero_stage": 0, "method": LORA},
    "fsdp2-full": {"training.zero_stage": 3},
    "fsdp2-lora": {"training.zero_stage": 2, "method": LORA},
}
KILLS = 5


def kills_of(case: int) -> list[Killed]:
    """Draw this case's share of 20 kills, of which each point has two, in any order, on either rank."""
    draw = random.Random(20)
    points = list(POINTS) * 2
    draw.shuffle(points)
    kills = [Killed(0 if point in ONLY_RANK_0 else draw.randrange(2), point, draw.randint(1, 3)) for point in points]
    return kills[case * KILLS : (case + 1) * KILLS]


def end_of(ranks, killed: int, alone: bool) -> list[int]:
    """Wait until a rank is dead; the others then die with it, or find out for themselves."""
    ranks[killed].join(60)
    for rank in ranks:
        if not alone and rank.is_alive():
            rank.kill()
    return finish(ranks)


def whole_state(run, step: int) -> dict:
    """Read the shards of a checkpoint as any DCP tool does."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(run.directory / f"checkpoints/step-{step:08d}", run.directory / "whole.pt")
    return run.tensors("whole.pt")


def assert_same_tensors(left: dict, right: dict) -> None:
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def assert_ended_alike(run, straight, weights: str) -> None:
    assert run.losses == straight.losses
    assert_same_tensors(run.tensors(weights), straight.tensors(weights))
    published = sorted((run.directory / "checkpoints").glob("[!l]*"))
    assert [path.name[:5] for path in published] == ["step-"] * 2 and not any(map(damage_of, published))


@pytest.mark.parametrize("case", CASES)
def test_a_run_killed_again_and_again_ends_bit_for_bit_like_a_straight_one(tiny_run, case):
    number = list(CASES).index(case)
    changes = {**QUIET, **CASES[case], "training.steps": 24, "training.checkpoint.every": 1}
    straight, killed = tiny_run("straight", **changes), tiny_run("killed", **changes)
    killed.change("training.checkpoint.asynchronous", True)
    straight.change("training.checkpoint.every", 24)
    assert straight.train() == [0, 0], straight.log()

    for attempt, kill in enumerate(kills_of(number)):
        ranks = start_ranks(killed.write_settings(), 2, killed.directory, prepare=kill)
        codes = end_of(ranks, kill.rank, alone=attempt % 2 == 0)
        assert codes[kill.rank] == -signal.SIGKILL, (kill, killed.log(kill.rank))
    assert killed.train() == [0, 0], killed.log()

    assert_ended_alike(killed, straight, "weights/delta.pt" if "lora" in case else "weights/model.pt")


def test_the_twenty_kills_are_everywhere():
    kills = [kill for case in range(len(CASES)) for kill in kills_of(case)]

    assert len(kills) == 20 and {kill.point for kill in kills} == set(POINTS)
    assert {kill.rank for kill in kills} == {0, 1}


def test_a_run_continues_on_fewer_and_on_more_ranks_with_other_sharding(tiny_run):
    changes = {**QUIET, "training.steps": 9, "training.checkpoint.every": 3}
    straight, moved = tiny_run("straight", **changes), tiny_run("moved", **changes)
    assert straight.train() == [0, 0]

    moved.change("training.zero_stage", 3)
    assert -signal.SIGKILL in finish(
        start_ranks(moved.write_settings(), 2, moved.directory, prepare=Killed(0, "update", 5))
    )
    for key, value in {"expected_world_size": 1, "training.zero_stage": 0, "training.grad_accum": 2}.items():
        moved.change(key, value)
    assert finish(start_ranks(moved.write_settings(), 1, moved.directory, prepare=Killed(0, "update", 5))) == [-9]
    for key, value in {"expected_world_size": 2, "training.zero_stage": 2, "training.grad_accum": 1}.items():
        moved.change(key, value)
    assert moved.train() == [0, 0], moved.log()

    assert "continuing after step 3" in moved.log() and "continuing after step 6" in moved.log()
    assert moved.losses == pytest.approx(straight.losses, abs=2e-4)
    state, weights = whole_state(moved, 9), moved.tensors("weights/model.pt")
    assert_same_tensors({name: state[f"model.{name}"] for name in weights}, weights)
    assert len(state) == 4 * len(weights)


def test_steps_go_on_while_a_slow_disk_writes_the_state_of_before(tiny_run):
    changes = {**QUIET, "training.steps": 9, "training.checkpoint.every": 5}
    waiting, run = tiny_run("waiting", **changes), tiny_run("run", **changes)
    assert waiting.train() == [0, 0]
    run.change("training.checkpoint.asynchronous", True)

    assert finish(start_ranks(run.write_settings(), 2, run.directory, prepare=SlowDisk(3.0))) == [0, 0], run.log()

    times = [line["time"] for line in run.lines("metrics.jsonl")]
    assert times[8] - times[4] < 2.0
    assert run.json("outcome.json")["checkpoint_step"] == 9
    for step in (5, 9):
        assert_same_tensors(whole_state(run, step), whole_state(waiting, step))


def test_a_run_that_diverges_still_finishes_the_save_in_flight(tiny_run):
    run = tiny_run(**{**QUIET, "training.lr": 1e30, "training.warmup_steps": 0, "training.clip_grad_norm": 1e30})
    run.change("training.checkpoint", {"every": 1, "keep": 2, "asynchronous": True})

    assert finish(start_ranks(run.write_settings(), 2, run.directory, prepare=SlowDisk(1.0))) == [1, 1]

    assert run.json("errors/rank-1.json")["type"] == "FloatingPointError"
    assert damage_of(run.directory / "checkpoints/step-00000001") is None


def test_a_disk_that_fills_up_ends_the_run_with_a_reason_and_costs_no_earlier_checkpoint(tiny_run):
    changes = {**QUIET, "training.steps": 6, "training.checkpoint": {"every": 2, "keep": 2, "asynchronous": True}}
    straight, run = tiny_run("straight", **changes), tiny_run("full", **changes)
    assert straight.train() == [0, 0]

    assert finish(start_ranks(run.write_settings(), 2, run.directory, prepare=FullDisk(1, 2))) == [1, 1]

    for rank in range(2):
        error = run.json(f"errors/rank-{rank}.json")
        assert error["type"] == "CheckpointError" and not error["user_error"]
        begins = "the checkpoint of step 4 could not be written: rank 1: [Errno 28] No space left on device: "
        assert error["message"].startswith(begins)
        assert error["message"].endswith("/checkpoints/.step-00000004.partial/__1_0.distcp'")
    assert sorted(path.name for path in (run.directory / "checkpoints").iterdir()) == ["latest", "step-00000002"]
    assert run.train() == [0, 0]
    assert_ended_alike(run, straight, "weights/model.pt")
