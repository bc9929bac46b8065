"""One line on where a run stands."""

from __future__ import annotations

from typing import Any

from cpm_cluster.specs.values import format_duration


def progress_line(progress: dict[str, Any]) -> str:
    """`step 40/150 · loss 5.21 · eval 5.4 · 9,120 tokens/s · 1 min 5 s left`; what is not known is left out."""
    parts = [f"step {progress.get('step', 0)}/{progress.get('steps', '?')}"]
    for name, key in (("loss", "loss"), ("eval", "eval_loss")):
        if progress.get(key) is not None:
            parts.append(f"{name} {progress[key]:.3f}")
    if progress.get("tokens_per_second"):
        parts.append(f"{progress['tokens_per_second']:,.0f} tokens/s")
    if progress.get("eta_seconds") and progress.get("phase") == "training":
        parts.append(f"{format_duration(progress['eta_seconds'])} left")
    if progress.get("checkpoint_step"):
        parts.append(f"checkpoint of step {progress['checkpoint_step']}")
    return " · ".join(parts)
