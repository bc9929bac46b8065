"""Whether a job fits, how long it takes and what it costs: the answer before the queue."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from cpm_cluster.planner.calibration import Calibration
from cpm_cluster.planner.cost import cost
from cpm_cluster.planner.demands import demands, run_time
from cpm_cluster.planner.fit import Fit
from cpm_cluster.planner.job_setup import job_setup
from cpm_cluster.specs.job import JobSpec

NOT_JUDGED = "engine command: what your own program needs of GPUs, hosts and time is not judged"
NO_RATE = "no time is predicted: the ranks compute on CPUs, of which no rate is known"
UNKNOWN_GPU = (
    "the type of GPU is not known: name it (resources.gpu, or the cluster's gpu) to have memory and time judged"
)
UNCALIBRATED = "not calibrated on this image and GPU: the intervals are those of published runs"
NOT_CREDIBLE = "faster than anything published for its GPU: do not rely on the time"


def answer(spec: JobSpec, calibration: Calibration | None = None) -> Fit:
    """All that can be said of a job before it is submitted."""
    found = judge(spec, calibration)
    if found.verdict not in ("does not fit", "tight"):
        return found
    from cpm_cluster.planner.advice import advise  # only where it is asked for: it plans hundreds of jobs

    return replace(found, advice=advise(spec, found, partial(judge, calibration=calibration)))


def judge(spec: JobSpec, calibration: Calibration | None = None) -> Fit:
    """The figures without advice."""
    setup = job_setup(spec)
    found = Fit(tuple(demands(spec, setup, calibration)))
    if setup is None:
        return replace(found, notes=(NOT_JUDGED,))
    if spec.resources.gpus_per_node and spec.gpu is None:
        return replace(found, notes=(UNKNOWN_GPU,))
    time = run_time(spec, setup, calibration)
    if time is None:
        return replace(found, notes=(NO_RATE,))
    origin = calibration.note if calibration and calibration.is_of(setup) else UNCALIBRATED
    notes = (origin,) if time.step.credible else (origin, NOT_CREDIBLE)
    spent = cost(setup, time.step, time.steps, spec.gpu, spec.cluster.gpu_price_per_hour_usd)
    return replace(found, time=time, cost=spent, notes=notes)
