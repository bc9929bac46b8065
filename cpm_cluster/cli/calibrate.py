"""`cpm plan --calibrate RUN…`: from finished runs to a calibration that later plans use; planned beside measured."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cpm_cluster import __version__
from cpm_cluster.cli import here
from cpm_cluster.planner.calibrate import CalibrationError, MeasuredRun, Models, Refusal, calibrate
from cpm_cluster.planner.calibration import Calibration, Scaling, Subject
from cpm_cluster.planner.calibration_file import QUANTITIES, calibration_text, file_name, find_calibration
from cpm_cluster.planner.demands import in_wide_weights
from cpm_cluster.planner.gpu_memory import gpu_memory
from cpm_cluster.planner.host_memory import host_memory
from cpm_cluster.planner.job_setup import as_loaded, job_setup
from cpm_cluster.planner.setup import Setup, Shape
from cpm_cluster.runs.measured import measured, predicted
from cpm_cluster.runs.records import write_text
from cpm_cluster.runs.run import Run, find_run
from cpm_cluster.runs.state import read_state
from cpm_cluster.specs.job import JobSpec
from cpm_cluster.specs.values import format_size

MIB = 1 << 20
ENDED_WELL = ("finished", "stopped")
TITLES = {"gpu_memory": "GPU memory", "host_memory": "host memory", "step_time": "speed"}
# As the answer plans our engines, with the allocator's cache, which nvidia-smi counts.
MODELS = Models(
    gpu_memory=lambda setup: in_wide_weights(gpu_memory(setup), setup),
    host_memory=lambda setup: host_memory(as_loaded(setup)),
)


def calibration_for(spec: JobSpec) -> Calibration | None:
    """The calibration that a job is planned with; None where there is none.

    Raises:
        SpecError: its file can't be read.
    """
    setup = job_setup(spec)
    if setup is None or not setup.gpu:
        return None
    return find_calibration(folder(), Subject(spec.image.tag if spec.image else "", setup.gpu, setup.engine))


def folder() -> Path:
    """Where calibrations are kept."""
    return here.config_home() / "cpm-cluster" / "calibration"


def calibrate_runs(names: tuple[str, ...], runs_dir: Path) -> Iterator[str]:
    """Fit the models to runs, keep the calibration, and say in lines of text what came of it.

    Raises:
        CalibrationError: no run can be used; the message names each, and why.
        RunError: a name is no run.
        OSError: the file can't be written.
    """
    found = [measured_run(find_run(runs_dir, name)) for name in names]
    unread = [one for one in found if isinstance(one, Refusal)]
    usable = [one for one in found if isinstance(one, MeasuredRun)]
    if not usable:
        raise CalibrationError("\n".join(map(str, unread)))
    try:
        calibration, refused = calibrate(usable, MODELS, time.strftime("%Y-%m-%d"), __version__)
    except CalibrationError as error:
        raise CalibrationError("\n".join([*map(str, unread), str(error)])) from None
    path = folder() / file_name(calibration.subject)
    write_text(path, calibration_text(calibration))
    yield calibration.note
    for name, groups in QUANTITIES.items():
        yield _scaling_line(TITLES[name], groups, getattr(calibration, name))
    yield from (f"left out: {refusal}" for refusal in (*unread, *refused))
    yield f"written to {path}"


def _scaling_line(title: str, groups: tuple[str, ...], scaling: Scaling | None) -> str:
    if scaling is None:
        return f"{title:<11} not measured"
    factors = ", ".join(f"{group} × {value:.2f}" for group, value in zip(groups, scaling.multipliers, strict=True))
    return f"{title:<11} {factors}; {scaling.runs} run(s), residual {scaling.residual:.1%}"


def measured_run(run: Run) -> MeasuredRun | Refusal:
    """What a run did and was planned with, or why that can't be said."""
    state = read_state(run, alive=False)
    if state.name not in ENDED_WELL:
        return Refusal(run.id, f"is {state.name}; a calibration needs runs that have finished, or stopped in order")
    plan = predicted(run)
    recorded = (plan or {}).get("setup")
    if not isinstance(plan, Mapping) or not isinstance(recorded, Mapping):
        why = "keeps no setup: it had no GPUs, a program of its own, or an older cpm-cluster"
        return Refusal(run.id, f"{run.files.fit.name} {why}")
    try:
        setup = _setup(recorded)
    except (TypeError, KeyError) as error:
        return Refusal(run.id, f"{run.files.fit.name}: setup: is of another version of cpm-cluster: {error}")
    peaks = measured(run)
    return MeasuredRun(
        name=run.id,
        subject=Subject(str(plan.get("image") or ""), setup.gpu, setup.engine),
        setup=setup,
        gpu_memory_mib=peaks.gpu_memory_mib,
        gpu_total_mib=peaks.gpu_total_mib,
        host_memory_bytes=peaks.host_memory_bytes,
        tokens_per_s_per_gpu=peaks.tokens_per_s / setup.gpus if peaks.tokens_per_s is not None else None,
    )


def _setup(recorded: Mapping[str, Any]) -> Setup:
    """From `asdict`. Raises TypeError or KeyError for one of other keys."""
    values = {**recorded, "shape": Shape(**recorded["shape"]), "lora_targets": tuple(recorded["lora_targets"])}
    return Setup(**values)


def planned_beside_measured(run: Run) -> Iterator[str]:
    """`GPU memory: planned 44.9 GiB (42 GiB to 49 GiB), used 43.1 GiB (-4 %)`, for each that was measured."""
    peaks = measured(run)
    used = {
        "GPU memory": peaks.gpu_memory_mib and peaks.gpu_memory_mib * MIB,
        "host memory": peaks.host_memory_bytes,
    }
    for demand in (predicted(run) or {}).get("demands", ()):
        size = used.get(demand["resource"])
        planned = sum(component["bytes"] for component in demand["components"])
        if size and planned:
            low, high = format_size(demand["low_bytes"]), format_size(demand["high_bytes"])
            yield (
                f"{demand['resource']}: planned {format_size(planned)} ({low} to {high}),"
                f" used {format_size(round(size))} ({size / planned - 1:+.0%})"
            )
