"""From a job file to everything that can be said before submission: the job, its fit, its plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cpm_cluster.launch.plan import LaunchPlan
from cpm_cluster.launch.resolve import Submitter, resolve
from cpm_cluster.planner.answer import answer
from cpm_cluster.planner.calibration import Calibration
from cpm_cluster.planner.fit import Fit
from cpm_cluster.specs.catalogue import Catalogue
from cpm_cluster.specs.compose import load_job
from cpm_cluster.specs.job import JobSpec
from cpm_cluster.specs.problems import Location, Problem, SpecError

NO_DEEPSPEED = (
    "the trainer has no deepspeed, which can only be planned; write bmtrain or torch, or start a DeepSpeed program of"
    " your own with engine: command"
)


@dataclass(frozen=True)
class Prepared:
    """What will happen, complete, with nothing done yet."""

    spec: JobSpec
    fit: Fit
    plan: LaunchPlan


def read_job(path: Path, overrides: Sequence[str], catalogue: Catalogue, has_slurm: bool) -> JobSpec:
    """The composed job; one that names no cluster runs on Slurm where there is one, else here.

    Raises:
        SpecError: everything that is wrong with it.
    """
    return load_job(path, overrides, catalogue, "slurm" if has_slurm else "local")


def prepare(
    spec: JobSpec, run_id: str, run_dir: Path, submitter: Submitter, calibration: Calibration | None = None
) -> Prepared:
    """The job with its fit and its plan.

    Raises:
        SpecError: its engine can be planned but is none of the trainer's.
    """
    if spec.engine == "deepspeed":
        raise SpecError([Problem(_written(spec, "engine"), "engine", NO_DEEPSPEED)])
    return Prepared(spec, answer(spec, calibration), resolve(spec, run_id, str(run_dir), submitter))


def _written(spec: JobSpec, key: str) -> Location:
    origin = spec.origins.get(key)
    return (origin.where if origin else None) or Location("the job")
