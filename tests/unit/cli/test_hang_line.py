"""A run that hangs, as cpm status shows it."""

from __future__ import annotations

import json

from click.testing import CliRunner

from cpm_cluster.cli.status import command
from cpm_cluster.runs.records import read_events, write_json

HANGS = "rank 1 on n1 has not moved for 300 s (step 17, data) while the others wait"


def test_the_rank_that_the_others_wait_for_is_named_while_the_run_goes_on(made_run):
    made = made_run().phase("training")
    now = read_events(made.run.files.root / "events")[0]["time"] + 1000.0
    for rank, phase in enumerate(("exchange", "data")):
        beat = {"rank": rank, "host": f"n{rank}", "step": 17, "phase": phase, "since": now - 300.0, "time": now}
        write_json(made.run.files.heartbeats / f"rank-{rank}.json", {**beat, "ended": None})

    def status(*words):
        return CliRunner().invoke(command, [str(made.run.files.root), *words], standalone_mode=False).output

    assert f"\n  it may hang: {HANGS}\n" in status()
    assert json.loads(status("--json"))["hang"] == HANGS
    made.exited(1)
    assert "hang" not in status() and "hang" not in json.loads(status("--json"))
