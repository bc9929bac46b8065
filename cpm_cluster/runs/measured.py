"""What a run needed, for calibration: the peaks in its telemetry and its speed once it has warmed up."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Any

from cpm_cluster.runs.records import read_json, read_lines
from cpm_cluster.runs.run import Run
from cpm_cluster.runs.telemetry import run_telemetry

# Records at the start of an attempt whose steps hold what happens once: kernels loaded, links set up, buffers grown.
WARM_UP = 3
FEWEST = 3  # speeds that a median is taken of


@dataclass(frozen=True)
class Measured:
    """Peaks over the whole run, and the usual speed. None: not measured."""

    gpu_memory_mib: float | None  # of the fullest GPU
    gpu_total_mib: float | None
    host_memory_bytes: float | None  # resident, all ranks of the fullest node
    tokens_per_s: float | None  # of all ranks


def measured(run: Run) -> Measured:
    telemetry = run_telemetry(run.files.root / "telemetry") or {}
    gpus: list[dict[str, Any]] = telemetry.get("gpus", [])
    fullest = max(gpus, key=lambda gpu: float(gpu["used_mib"]), default=None)
    host = telemetry.get("host")
    return Measured(
        gpu_memory_mib=fullest["used_mib"] if fullest else None,
        gpu_total_mib=fullest["total_mib"] if fullest else None,
        host_memory_bytes=host["rss_bytes"] if host else None,
        tokens_per_s=usual_speed(read_lines(run.files.root / "metrics.jsonl")),
    )


def predicted(run: Run) -> dict[str, Any] | None:
    """What the planner said of it, with the `image` and the `setup` of which it did; None where that is damaged."""
    record = read_json(run.files.fit)
    return record if record and isinstance(record.get("demands", []), list) else None


def usual_speed(metrics: list[dict[str, Any]]) -> float | None:
    """Median tokens/s from one record to the next, without the first ones and those with an evaluation between.

    A save or a restart falls between few records, so that the median leaves it out.
    """
    known = [m for m in metrics if isinstance(m.get("time"), (int, float)) and isinstance(m.get("tokens_seen"), int)]
    speeds = [
        (after["tokens_seen"] - before["tokens_seen"]) / (after["time"] - before["time"])
        for before, after in zip(known[WARM_UP:], known[WARM_UP + 1 :])
        if after.get("eval_loss") is None and after["time"] > before["time"]
    ]
    return median(speeds) if len(speeds) >= FEWEST else None
