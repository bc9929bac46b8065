"""From finished runs to a calibration that later plans use."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from cpm_cluster import __version__
from cpm_cluster.calibration.planned import recorded_setup
from cpm_cluster.planner import cpu
from cpm_cluster.planner.calibrate import CalibrationError, MeasuredRun, Models, Refusal, calibrate
from cpm_cluster.planner.calibration import Calibration, Subject
from cpm_cluster.planner.calibration_file import calibration_text, file_name, find_calibration
from cpm_cluster.planner.demands import in_our_engine
from cpm_cluster.planner.gpu_memory import gpu_memory
from cpm_cluster.planner.host_memory import host_memory
from cpm_cluster.planner.job_setup import CPU, as_loaded, job_setup
from cpm_cluster.runs.measured import measured, predicted
from cpm_cluster.runs.records import write_text
from cpm_cluster.runs.run import Run
from cpm_cluster.runs.state import read_state
from cpm_cluster.specs.job import JobSpec

# As the answer plans our engines, with the allocator's cache, which nvidia-smi counts.
GPU_MODELS = Models(
    gpu_memory=lambda setup: in_our_engine(gpu_memory(setup), setup),
    host_memory=lambda setup: host_memory(as_loaded(setup)),
)
CPU_MODELS = replace(
    GPU_MODELS,
    host_memory=cpu.host_memory,
    step_time=cpu.step_time,
    time_expected=cpu.TIME_EXPECTED,
    host_noise=cpu.NOISE,
    time_noise=cpu.NOISE,
)
ENDED_WELL = ("finished", "stopped")


@dataclass(frozen=True)
class Calibrated:
    """What came of some runs, and where it is kept."""

    calibration: Calibration
    refused: tuple[Refusal, ...]
    path: Path


def calibration_for(spec: JobSpec, folder: Path) -> Calibration | None:
    """The calibration that a job is planned with; None where there is none.

    Raises:
        SpecError: its file can't be read.
    """
    setup = job_setup(spec) if spec.engine != "command" else None  # runs of ours say nothing of others' programs
    if setup is None or not setup.gpu:
        return None
    return find_calibration(folder, Subject(spec.image.tag if spec.image else "", setup.gpu, setup.engine))


def calibrate_runs(runs: Iterable[Run], folder: Path) -> Calibrated:
    """Fit the models to runs, and keep the calibration.

    Raises:
        CalibrationError: no run can be used; the message names each, and why.
        OSError: the file can't be written.
    """
    found = [measured_run(run) for run in runs]
    unread = tuple(one for one in found if isinstance(one, Refusal))
    usable = [one for one in found if isinstance(one, MeasuredRun)]
    if not usable:
        raise CalibrationError("\n".join(map(str, unread)))
    try:
        calibration, refused = calibrate(usable, models_of(usable[0].subject), time.strftime("%Y-%m-%d"), __version__)
    except CalibrationError as error:
        raise CalibrationError("\n".join([*map(str, unread), str(error)])) from None
    path = folder / file_name(calibration.subject)
    write_text(path, calibration_text(calibration))
    return Calibrated(calibration, (*unread, *refused), path)


def models_of(subject: Subject) -> Models:
    return CPU_MODELS if subject.gpu == CPU else GPU_MODELS


def measured_run(run: Run) -> MeasuredRun | Refusal:
    """What a run did and was planned with, or why that can't be said."""
    state = read_state(run, alive=False)
    if state.name not in ENDED_WELL:
        became = "lost, or not at its end yet" if state.name == "lost" else state.name  # the scheduler isn't asked
        return Refusal(run.id, f"is {became}; a calibration needs runs that have finished, or stopped in order")
    record = predicted(run) or {}
    try:
        setup = recorded_setup(record)
    except (TypeError, KeyError) as error:
        return Refusal(run.id, f"{run.files.fit.name}: setup: is of another version of cpm-cluster: {error}")
    if setup is None:
        why = "keeps no setup: its GPUs were pretended, its program its own, or its cpm-cluster an older one"
        return Refusal(run.id, f"{run.files.fit.name} {why}")
    if not setup.gpu:
        return Refusal(run.id, f"{run.files.fit.name}: setup: says not which GPU: name it in the job or cluster file")
    peaks = measured(run)
    return MeasuredRun(
        name=run.id,
        subject=Subject(str(record.get("image") or ""), setup.gpu, setup.engine),
        setup=setup,
        gpu_memory_mib=peaks.gpu_memory_mib,
        gpu_total_mib=peaks.gpu_total_mib,
        host_memory_bytes=peaks.host_memory_bytes,
        tokens_per_s_per_gpu=peaks.tokens_per_s / setup.gpus if peaks.tokens_per_s is not None else None,
    )
