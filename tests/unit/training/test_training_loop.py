"""What the loop says of itself: heartbeats, speed, waits, memory, stragglers; and its deterministic mode."""

from __future__ import annotations

import json
import math
import os
import time

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.checkpoint import checkpoint
from training_ranks import finish, wait_for

from cpm_cluster.training.engines.determinism import compute_deterministically
from cpm_cluster.training.engines.forward_clock import ForwardClock
from cpm_cluster.training.reporting.heartbeat import Heartbeat, clear_heartbeats
from cpm_cluster.training.reporting.measurements import Meter, stragglers
from cpm_cluster.training.reporting.progress import Speed
from cpm_cluster.training.reporting.records import step_line
from cpm_cluster.training.settings import WorkSettings
from cpm_cluster.training.stop import StopRequest

pytestmark = pytest.mark.timeout(90)


def test_a_record_has_what_one_looks_for_under_the_tags_that_are_documented(tiny_run):
    work = {"flops_per_token": 1e6, "peak_flops_per_rank": 1e12}
    run = tiny_run(work=work, **{"training.checkpoint.every": 2, "training.log_every": 2})

    assert run.train() == [0, 0], run.log()

    first, _, last = (line for line in run.lines("metrics.jsonl") if line["step"] in (2, 4, 6))
    assert last["tokens_per_second"] == pytest.approx(2 * last["tokens_per_second_per_rank"])
    assert last["mfu"] == pytest.approx(last["tokens_per_second"] * 1e6 / 2e12)
    assert 0 <= last["data_seconds"] < last["step_seconds"] < 5
    assert last["checkpoint_seconds"] > first["checkpoint_seconds"]
    assert last["memory_resident_bytes"] > 1e8 and last["memory_allocated_bytes"] is None
    assert last["slowest_rank"] in (0, 1) and last["slowest_over_median"] >= 1 and last["forward_seconds"] > 0
    assert (last["loss_scale"], last["guard_events"], last["events"]) == (1.0, 0, [])
    board = EventAccumulator(str(run.directory / "tb")).Reload()
    speed = {f"speed/{name}" for name in ("tokens_per_second_per_rank", "step_seconds", "mfu", "data_seconds")}
    others = {"memory/resident_bytes", "stragglers/slowest_rank", "stragglers/slowest_over_median", "guard/events"}
    assert speed | others | {"speed/checkpoint_seconds"} <= set(board.Tags()["scalars"])
    progress = run.json("progress.json")
    assert progress["memory_bytes"] == last["memory_resident_bytes"]
    assert progress["step_seconds"] > 0 and progress["mfu"] > 0 and progress["guard_events"] == 0


def test_the_line_of_a_step():
    record = {"step": 20, "loss": 4.12345, "lr": 3e-4, "grad_norm": 1.5, "tokens_per_second": 1234.5, "mfu": 0.4121}
    assert step_line(record, 300) == "step 20/300 loss 4.1235 lr 3.00e-04 grad_norm 1.500 tokens/s 1234 mfu 0.412"

    nothing = {**record, "loss": None, "grad_norm": None, "mfu": None, "eval_loss": 4.0}
    expected = "step 20/300 loss nan lr 3.00e-04 grad_norm overflow tokens/s 1234 eval_loss 4.0000"
    assert step_line(nothing, 300) == expected


def test_speed_and_utilisation_are_those_of_the_last_steps():
    speed = Speed(WorkSettings(flops_per_token=6e9, peak_flops_per_rank=1e15), world_size=4)
    for _ in range(30):
        speed.note(9.0, 1)
    for _ in range(20):
        speed.note(0.5, 100_000)

    assert (speed.tokens_per_second, speed.step_seconds, speed.eta_seconds(10)) == (200_000.0, 0.5, 5.0)
    assert speed.mfu == pytest.approx(200_000 * 6e9 / 4e15)
    assert Speed(WorkSettings(None, 1e15), 1).mfu is None and Speed(WorkSettings(6e9, None), 1).mfu is None


def test_the_slowest_rank_is_compared_with_the_median():
    assert stragglers([0.2, 0.2, 0.5, 0.25]) == {
        "slowest_rank": 2,
        "forward_seconds": 0.2,
        "slowest_over_median": 2.5,
    }
    assert set(stragglers([0.2, math.nan]).values()) == {None}


def test_what_is_exchanged_begins_anew_with_each_record():
    meter, others = Meter(), (0.5, 9.0, 5e12, 7.0, 8.0, 0.5)
    with meter.waiting_for_data():
        time.sleep(0.02)
    meter.step(0.2)
    meter.step(0.4)

    read = meter.read(lambda own: [tuple(own), others])
    assert (read["data_seconds"], read["checkpoint_seconds"], read["memory_resident_bytes"]) == (0.5, 9.0, 5 * 10**12)
    assert (read["memory_allocated_bytes"], read["memory_reserved_bytes"]) == (7, 8)
    assert read["slowest_rank"] == 1 and read["forward_seconds"] == pytest.approx(0.3)

    meter.step(None)
    alone = meter.read(lambda own: [tuple(own)])
    assert alone["data_seconds"] == alone["checkpoint_seconds"] == 0.0 and alone["slowest_rank"] is None


@pytest.mark.parametrize("recompute", [False, True])
def test_a_rank_that_computes_slowly_is_told_from_those_that_wait_for_it(recompute, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("cpm_cluster.training.engines.forward_clock.time.perf_counter", lambda: now[0])

    def forward(value):
        now[0] += 1.0
        return value * 2

    layer = torch.nn.Identity()
    layer.forward = forward
    clock = ForwardClock([layer], torch.device("cpu"))
    value = torch.ones(1, requires_grad=True)
    with clock:
        for _ in range(2):
            now[0] += 100.0  # between the layers a rank may wait for the others
            value = checkpoint(layer, value, use_reentrant=False) if recompute else layer(value)
    value.backward()

    assert clock.seconds() == 2.0
    with clock:
        layer(value)
    assert clock.seconds() == 1.0


def test_each_rank_leaves_a_heartbeat_that_says_where_it_was(tiny_run):
    run = tiny_run(**{"training.steps": 100_000, "training.checkpoint.every": 100_000, "training.eval_every": 0})
    (run.directory / "heartbeats").mkdir()
    (run.directory / "heartbeats/rank-2.json").write_text("{}")
    ranks = run.start()
    wait_for(lambda: run.steps_recorded > 2)
    beats = [run.json(f"heartbeats/rank-{rank}.json") for rank in (0, 1)]
    assert [(beat["rank"], beat["pid"], beat["ended"]) for beat in beats] == [
        (rank, ranks[rank].pid, None) for rank in (0, 1)
    ]
    run.ask_to_stop()
    assert finish(ranks) == [85, 85], run.log()

    outcome = run.json("outcome.json")
    assert sorted(path.name for path in (run.directory / "heartbeats").iterdir()) == ["rank-0.json", "rank-1.json"]
    for rank in (0, 1):
        beat = run.json(f"heartbeats/rank-{rank}.json")
        assert (beat["step"], beat["phase"], beat["ended"]) == (outcome["step"], "stopped", "stopped")


def test_a_heartbeat_goes_on_while_the_rank_does_not(tmp_path, monkeypatch):
    monkeypatch.setattr("cpm_cluster.training.reporting.heartbeat._SECONDS_BETWEEN_WRITES", 0.02)
    heartbeat = Heartbeat(tmp_path, 3)
    heartbeat.enter("data", 17)

    def read():
        return json.loads((tmp_path / "heartbeats/rank-3.json").read_text())

    wait_for(lambda: read()["step"] == 17)
    first = read()
    wait_for(lambda: read()["time"] > first["time"])
    assert (read()["phase"], read()["since"]) == ("data", first["since"])
    heartbeat.close("failed")
    assert (read()["phase"], read()["ended"]) == ("data", "failed")
    clear_heartbeats(tmp_path, 3)
    assert list((tmp_path / "heartbeats").iterdir()) == []


def test_the_stop_file_is_not_looked_for_at_every_step(tmp_path):
    stop = StopRequest(tmp_path)
    assert not stop.pending
    (tmp_path / "control").mkdir()
    (tmp_path / "control/stop").touch()
    assert not stop.pending

    wait_for(lambda: stop.pending)


def test_a_deterministic_run_repeats_itself_bit_for_bit_and_trains_like_any_other(tiny_run):
    changes = {"deterministic": True, "training.precision": "bf16", "training.zero_stage": 3}
    lora = {"kind": "lora", "rank": 4, "alpha": 8, "dropout": 0.3, "targets": ["project_q", "w_out"]}
    first, second = (tiny_run(name, method=lora, **changes) for name in ("first", "second"))
    free = tiny_run("free", method=lora, **{**changes, "deterministic": False})

    assert first.train() == second.train() == free.train() == [0, 0], first.log()

    weights, again = first.tensors("weights/delta.pt"), second.tensors("weights/delta.pt")
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert first.losses == second.losses == pytest.approx(free.losses, abs=0.02)


def test_deterministic_mode_refuses_operations_that_are_not(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    try:
        compute_deterministically()
        assert (
            torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
        )
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8" and not torch.backends.cudnn.benchmark
    finally:
        torch.use_deterministic_algorithms(False)
