"""What came of a calibration, as lines of text and as data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from cpm_cluster.calibration.from_runs import Calibrated
from cpm_cluster.planner.calibration import Scaling
from cpm_cluster.planner.calibration_file import QUANTITIES
from cpm_cluster.planner.job_setup import CPU

TITLES = {"gpu_memory": "GPU memory", "host_memory": "host memory", "step_time": "speed"}
WITHOUT_GPU = (
    "there was no GPU: this holds for jobs on CPUs alone; the plans of jobs with GPUs stay uncalibrated, in GPU memory,"
    " host memory and speed"
)


def calibration_lines(found: Calibrated) -> Iterator[str]:
    """From what, the multipliers of each quantity, what was left out, and where it is kept."""
    calibration = found.calibration
    yield calibration.note
    for name, groups in QUANTITIES.items():
        yield _scaling_line(TITLES[name], groups, getattr(calibration, name))
    if calibration.subject.gpu == CPU:
        yield WITHOUT_GPU
    yield from (f"left out: {refusal}" for refusal in found.refused)
    if not calibration.is_enough:
        yield "three runs or more, of different sizes, tell the terms apart: cpm calibrate JOB makes such runs"
    yield f"written to {found.path}"


def calibration_data(found: Calibrated) -> dict[str, Any]:
    """The same, for programs.

    `calibration` says of what it is (`subject`) and from which `runs`; each of `gpu_memory`, `host_memory` and
    `step_time` has `multipliers` by group of terms, the `residual` (a part of the prediction) and the number of `runs`,
    or is null where nothing was measured. `enough`: whether there were runs enough to tell the terms apart. `refused`
    are runs that were left out, and why; `path` is the file of the calibration.
    """
    kept = found.calibration
    scalings = {name: _scaling_data(groups, getattr(kept, name)) for name, groups in QUANTITIES.items()}
    return {
        "calibration": {
            "subject": asdict(kept.subject),
            "modes": list(kept.modes),
            "runs": list(kept.runs),
            "date": kept.date,
            "version": kept.version,
            **scalings,
        },
        "enough": kept.is_enough,
        "refused": [{"run": refusal.name, "why": refusal.why} for refusal in found.refused],
        "path": str(found.path),
    }


def _scaling_data(groups: tuple[str, ...], scaling: Scaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    multipliers = dict(zip(groups, scaling.multipliers, strict=True))
    return {"multipliers": multipliers, "residual": scaling.residual, "runs": scaling.runs}


def _scaling_line(title: str, groups: tuple[str, ...], scaling: Scaling | None) -> str:
    if scaling is None:
        return f"{title:<11} not measured: planned as without a calibration"
    factors = ", ".join(f"{group} × {value:.2f}" for group, value in zip(groups, scaling.multipliers, strict=True))
    return f"{title:<11} {factors}; {scaling.runs} run(s), residual {scaling.residual:.1%}"
