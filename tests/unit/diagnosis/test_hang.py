"""Which rank keeps a run from going on, as the heartbeats of its ranks tell."""

from __future__ import annotations

from typing import Any

import pytest

from cpm_cluster.diagnosis.diagnose import diagnose
from cpm_cluster.diagnosis.hang import hang
from cpm_cluster.runs.records import read_events, write_json
from cpm_cluster.runs.state import read_state


def beat(rank: int, step: int = 17, phase: str = "exchange", age: float = 300.0, **more: Any) -> dict[str, Any]:
    """What a rank has written 1,000 s into the attempt; `age`: how long it has been in its phase."""
    record = {"format": 1, "rank": rank, "pid": 1, "host": f"n{rank // 2}", "step": step, "phase": phase}
    return {**record, "since": 1000.0 - age, "time": 1000.0, "ended": None, **more}


@pytest.fixture
def said(made_run):
    """What is said of heartbeats: their times count from the beginning of the attempt."""

    def of(*beats: dict[str, Any], step_seconds: float | None = 2.0) -> str | None:
        made = made_run().submitted().phase("training")
        begun = read_events(made.run.files.root / "events")[0]["time"]
        write_json(made.run.files.progress, {"step": 16, "step_seconds": step_seconds})
        for record in beats:
            moved = {**record, "since": record["since"] + begun, "time": record["time"] + begun}
            write_json(made.run.files.heartbeats / f"rank-{record['rank']}.json", moved)
        return hang(made.run, read_state(made.run, alive=True))

    return of


def test_a_rank_that_still_reads_data_while_the_others_wait_is_named(said):
    waiting = [beat(0), beat(1, phase="compute"), beat(2)]

    text = said(*waiting, beat(3, phase="data", age=290.0))

    assert text == "rank 3 on n1 has not moved for 290 s (step 17, data) while the others wait"
    assert said(*waiting, beat(3, phase="data", age=100.0)) is None
    assert said(*waiting, beat(3, phase="data", age=290.0), step_seconds=20.0) is None


def test_a_rank_that_has_not_come_out_of_the_step_before_is_behind_too(said):
    text = said(beat(0), beat(1, step=16, phase="saving", age=500.0), beat(2, step=16, phase="saving", age=400.0))

    assert text == "rank 1 on n0 and 1 other have not moved for 400 s (step 16, saving) while the others wait"


def test_a_rank_that_does_not_beat_was_stopped(said):
    silent = beat(2, phase="compute", age=50.0, time=955.0)

    assert said(beat(0), beat(1), silent) == "rank 2 on n1 has not run for 45 s: stopped, or gone with the node"


@pytest.mark.parametrize(
    "beats",
    [
        [],
        [beat(0), beat(1, age=1.0)],
        [beat(0, age=1.0), beat(1, phase="data", age=1.0)],
        [beat(0, phase="saving", age=900.0), beat(1, phase="saving", age=900.0)],
        [beat(0, ended="finished"), beat(1, phase="data", time=900.0)],
        [beat(0), beat(1, phase="data", time=-1.0)],  # left by the attempt before
    ],
)
def test_nothing_is_said_of_a_run_that_goes_on(said, beats):
    assert said(*beats) is None


def test_ranks_that_all_wait_for_ever_are_not_told_apart(said):
    assert said(beat(0, age=700.0), beat(1, age=650.0)) == "no rank has moved for 650 s (step 17, exchange)"


def test_a_file_that_is_torn_or_of_another_kind_is_no_heartbeat(made_run):
    made = made_run().submitted().phase("training")
    made.run.files.heartbeats.mkdir()
    (made.run.files.heartbeats / "rank-0.json").write_text('{"rank": 0, "ste')
    (made.run.files.heartbeats / "rank-1.json").write_text('{"rank": "first"}')

    assert hang(made.run, read_state(made.run, alive=True)) is None


def test_a_broken_collective_is_traced_to_the_rank_that_did_not_come(made_run):
    made = made_run().submitted().phase("training").exited(1)
    begun = read_events(made.run.files.root / "events")[0]["time"]
    error = {"rank": 0, "type": "RuntimeError", "message": "Timed out waiting 1800000ms", "time": begun + 1000.0}
    write_json(made.run.files.errors / "rank-0.json", error)
    for record in (beat(0, ended="failed"), beat(1, phase="data", age=900.0)):
        moved = {**record, "since": record["since"] + begun, "time": record["time"] + begun}
        write_json(made.run.files.heartbeats / f"rank-{record['rank']}.json", moved)

    verdict = diagnose(made.run, read_state(made.run, alive=False))

    assert verdict is not None and verdict.category == "fabric"
    assert "rank 1 on n0 has not moved for 900 s (step 17, data) while the others wait" in str(verdict)
