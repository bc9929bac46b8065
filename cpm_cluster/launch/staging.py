"""Where a rehearsal takes place, and the job as it is there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cpm_cluster.launch.prepare import read_job
from cpm_cluster.launch.rehearsal import Rehearsal, Stage, named, overrides, rehearse
from cpm_cluster.specs.catalogue import Catalogue
from cpm_cluster.specs.job import JobSpec


@dataclass(frozen=True)
class Surroundings:
    """What of this machine decides: `slurm_conf` is the value of SLURM_CONF, `sandbox_conf` the sandbox's."""

    has_sbatch: bool
    slurm_conf: str | None
    has_site_conf: bool
    sandbox_conf: str
    has_sandbox: bool


@dataclass(frozen=True)
class Staged:
    """A job as its author wrote it, and as it can be on a stage."""

    written: JobSpec
    spec: JobSpec
    stage: Stage

    @property
    def name(self) -> str:
        """The name of the rehearsal."""
        return named(self.spec)


def variables(here: Surroundings) -> dict[str, str]:
    """What leads Slurm's commands to the sandbox, where nothing leads them to another cluster."""
    configured = here.slurm_conf is not None or here.has_site_conf
    return {"SLURM_CONF": here.sandbox_conf} if here.has_sbatch and here.has_sandbox and not configured else {}


def stage_of(here: Surroundings) -> Stage:
    """The sandbox where Slurm's commands mean it, the cluster of this machine, or this machine alone."""
    if not here.has_sbatch:
        return "local"
    slurm_conf = variables(here).get("SLURM_CONF", here.slurm_conf)
    if slurm_conf == here.sandbox_conf:
        return "sandbox"
    return "slurm" if slurm_conf is not None or here.has_site_conf else "local"


def read_staged(path: Path, sets: Sequence[str], catalogue: Catalogue, here: Surroundings) -> Staged:
    """The job as written and as staged; `sets` are texts of `--set`, which win over what the stage changes.

    Raises:
        SpecError: everything that is wrong with it.
    """
    stage = stage_of(here)
    # in the sandbox a file of the user or of the cluster may describe a stand-in, which lacks what the job asks for
    original = catalogue.without_stand_ins() if stage == "sandbox" else catalogue
    written = read_job(path, sets, original, here.has_sbatch)
    spec = read_job(path, (*overrides(written, stage), *sets), catalogue, here.has_sbatch)
    return Staged(written, spec, stage)


def staged_rehearsal(staged: Staged, run_dir: Path, exists: Callable[[str], bool]) -> Rehearsal:
    """The rehearsal in a run directory; `exists` says of a host path whether this machine has it."""
    missing = {path for path in staged.spec.mounts if staged.stage != "slurm" and not exists(path)}
    return rehearse(staged.written, staged.spec, staged.stage, str(run_dir), missing)
