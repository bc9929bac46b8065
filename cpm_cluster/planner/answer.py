"""Whether a job fits, how long it takes and what it costs: the answer before the queue."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from cpm_cluster.planner import cpu
from cpm_cluster.planner.calibration import Calibration
from cpm_cluster.planner.cost import cost
from cpm_cluster.planner.demands import demands, run_time
from cpm_cluster.planner.fit import Fit
from cpm_cluster.planner.inference import NO_TIME, demands_of_inference
from cpm_cluster.planner.job_setup import job_setup
from cpm_cluster.planner.programs import AS_DESCRIBED, demands_of_program, with_steps
from cpm_cluster.planner.setup import Setup
from cpm_cluster.specs.job import TRAINING_TASKS, JobSpec
from cpm_cluster.specs.workload import Workload

NOT_JUDGED = (
    "engine command: what your own program needs of GPUs, hosts and time is not judged; describe it below workload"
)
NO_RATE = "no time is predicted: the ranks compute on CPUs, of which no rate is known"
NO_RATE_YET = f"{NO_RATE}; cpm calibrate JOB measures it"
UNKNOWN_GPU = (
    "the type of GPU is not known: name it (resources.gpu, or the cluster's gpu) to have memory and time judged"
)
UNCALIBRATED = "not calibrated on this image and GPU: the intervals are those of published runs"
NOT_CREDIBLE = "faster than anything published for its GPU: do not rely on the time"


def answer(spec: JobSpec, calibration: Calibration | None = None) -> Fit:
    """All that can be said of a job before it is submitted."""
    found = judge(spec, calibration)
    if found.verdict not in ("does not fit", "tight") or spec.engine == "command":
        return found
    from cpm_cluster.planner.advice import advise  # only where it is asked for: it plans hundreds of jobs

    advice = advise(spec, found, partial(judge, calibration=calibration))
    return replace(found, advice=advice, nothing_helps=not advice)


def judge(spec: JobSpec, calibration: Calibration | None = None) -> Fit:
    """The figures without advice."""
    setup = job_setup(spec)
    found = Fit(tuple(demands(spec, setup, calibration)))
    if setup is None:
        return replace(found, notes=(NOT_JUDGED,))
    if spec.engine == "command" and spec.workload:
        return _program(spec, spec.workload, setup, found)
    if spec.task not in TRAINING_TASKS:
        return replace(found, demands=tuple(demands_of_inference(spec, setup, found.demands)), notes=(NO_TIME,))
    if not spec.resources.gpus_per_node:
        return _on_cpus(spec, setup, found, calibration)
    if spec.gpu is None:
        return replace(found, notes=(UNKNOWN_GPU,))
    origin = calibration.note if calibration and calibration.is_of(setup) else UNCALIBRATED
    return _with_time(spec, setup, replace(found, notes=(origin,)), calibration)


def _with_time(spec: JobSpec, setup: Setup, found: Fit, calibration: Calibration | None = None) -> Fit:
    time = run_time(spec, setup, calibration)
    if time is None:
        return replace(found, notes=(NO_RATE,))
    notes = found.notes if time.step.credible else (*found.notes, NOT_CREDIBLE)
    spent = cost(setup, time.step, time.steps, spec.gpu, spec.cluster.gpu_price_per_hour_usd)
    return replace(found, time=time, cost=spent, notes=notes)


def _program(spec: JobSpec, work: Workload, setup: Setup, found: Fit) -> Fit:
    """A program of the user's own; calibrations are of our trainer."""
    named = not spec.resources.gpus_per_node or spec.gpu is not None
    notes = (AS_DESCRIBED, *(() if named else (UNKNOWN_GPU,)))
    decided = tuple(demands_of_program(work, setup, found.demands))
    found = replace(found, demands=decided, as_described=True, notes=notes)
    has_rate = spec.resources.gpus_per_node and spec.gpu is not None and not spec.cluster.pretend_gpus
    timed = with_steps(spec, work) if has_rate else None
    return _with_time(timed, setup, found) if timed else found


def _on_cpus(spec: JobSpec, setup: Setup, found: Fit, calibration: Calibration | None) -> Fit:
    calibrated = partial(cpu.calibrated_demand, calibration, setup)
    of_host = (calibrated(demand) if demand.resource == "host memory" else demand for demand in found.demands)
    time = cpu.calibrated_run_time(calibration, setup, spec)
    known = (calibration.note,) if calibration and calibration.is_of(setup) else ()
    notes = known if time else (*known, NO_RATE_YET)
    return replace(found, demands=tuple(of_host), time=time, notes=notes)
