"""What came of a calibration, as lines of text."""

from __future__ import annotations

from collections.abc import Iterator

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


def _scaling_line(title: str, groups: tuple[str, ...], scaling: Scaling | None) -> str:
    if scaling is None:
        return f"{title:<11} not measured: planned as without a calibration"
    factors = ", ".join(f"{group} × {value:.2f}" for group, value in zip(groups, scaling.multipliers, strict=True))
    return f"{title:<11} {factors}; {scaling.runs} run(s), residual {scaling.residual:.1%}"
