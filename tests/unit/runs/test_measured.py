"""What a run is said to have needed: peaks from telemetry, speed from its metrics."""

from __future__ import annotations

import json

from cpm_cluster.runs.measured import measured, usual_speed


def metrics(*seconds, tokens=1000, **more):
    """Records of steps that took so long each."""
    time, found = 0.0, []
    for step, each in enumerate(seconds):
        time += each
        found.append({"step": step, "time": time, "tokens_seen": tokens * (step + 1), **more})
    return found


def test_the_speed_is_the_usual_one_of_warm_steps():
    assert usual_speed(metrics(60, 30, 9, 2, 2, 2, 2, 50, 2)) == 500


def test_steps_with_an_evaluation_between_do_not_count():
    records = metrics(1, 1, 1, 2, 2, 9, 9, 9, 9, 2, 2)
    for record in records[5:9]:
        record["eval_loss"] = 1.0
    assert usual_speed(records) == 500


def test_a_handful_of_steps_tells_no_speed():
    assert usual_speed(metrics(9, 2, 2, 2)) is None
    assert usual_speed([]) is None
    assert usual_speed([{"step": 1}, {"time": None, "tokens_seen": 3}] * 9) is None


def test_peaks_are_those_of_the_fullest_gpu_and_node(made_run):
    run = made_run(nodes=2)
    for node, used, rss in (("n1", 40_000, 5), ("n2", 61_000, 4)):
        peaks = {"rss_bytes": rss, "gpus": {"a": {"used_mib": used, "total_mib": 81_251}}}
        line = {"kind": "sample", "time": 1.0, "attempt": 1, "peaks": peaks}
        run.file(f"telemetry/{node}.jsonl", json.dumps(line) + "\n")
    found = measured(run.run)
    assert (found.gpu_memory_mib, found.gpu_total_mib, found.host_memory_bytes) == (61_000, 81_251, 5)
    assert found.tokens_per_s is None


def test_a_run_without_records_was_not_measured(made_run):
    found = measured(made_run().run)
    assert (found.gpu_memory_mib, found.host_memory_bytes, found.tokens_per_s) == (None, None, None)
