"""One line on where a run stands."""

from __future__ import annotations

from typing import Any

from cpm_cluster.specs.values import format_duration

TIMED = ("training", "evaluating", "saving", "scoring", "generating")


def progress_line(progress: dict[str, Any]) -> str:
    """`step 40/150 · loss 5.210 · eval 5.400 · 9,120 tokens/s · MFU 41% · 1 min 5 s left`, as far as it is known."""
    return " · ".join([step_of(progress), *measures(progress)])


def step_of(progress: dict[str, Any]) -> str:
    """`step 40/150`."""
    return f"step {progress.get('step', 0)}/{progress.get('steps', '?')}"


def measures(progress: dict[str, Any]) -> list[str]:
    """Loss, speed, what the loss guard did, time left and the newest checkpoint, as far as they are known."""
    parts = []
    for name, key in (("loss", "loss"), ("eval", "eval_loss")):
        if progress.get(key) is not None:
            parts.append(f"{name} {progress[key]:.3f}")
    if progress.get("tokens_per_second"):
        parts.append(f"{progress['tokens_per_second']:,.0f} tokens/s")
    if progress.get("mfu"):
        parts.append(f"MFU {progress['mfu']:.0%}")
    if progress.get("guard_events"):
        parts.append(f"guard {progress['guard_events']}×")
    if progress.get("eta_seconds") and progress.get("phase") in TIMED:
        parts.append(f"{format_duration(progress['eta_seconds'])} left")
    if progress.get("checkpoint_step"):
        parts.append(f"checkpoint of step {progress['checkpoint_step']}")
    return parts
