"""What the verbs that read job files know of this machine and of whoever types."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from cpm_cluster.launch.resolve import Submitter
from cpm_cluster.launch.staging import Surroundings
from cpm_cluster.specs.catalogue import Catalogue, default_catalogue, packaged_jobs

SITE_CONF = Path("/etc/slurm/slurm.conf")


def job_file(job: Path) -> Path:
    """The job file; a name that no file has may be one of the jobs that ship with the package."""
    if not job.name:  # "", "." and "/": folders
        return job
    shipped = packaged_jobs() / job.with_suffix(".yaml").name
    return shipped if not job.exists() and len(job.parts) == 1 and shipped.is_file() else job


def job_named(word: str) -> Path | None:
    """The job file that a word means; None where it is the name of a profile, or of nothing."""
    path = job_file(Path(word))
    is_path = len(path.parts) > 1 or path.suffix in (".yaml", ".yml")
    return path if is_path and not catalogue().find("profiles", word) else None


def catalogue() -> Catalogue:
    """The configs of whoever types, and those that ship with the package."""
    return default_catalogue(Path.cwd(), config_home())


def config_home() -> Path:
    """Where people keep their settings (XDG Base Directory Specification)."""
    if named := os.environ.get("XDG_CONFIG_HOME"):
        return Path(named)
    home = os.path.expanduser("~")
    if home == "~":
        raise OSError("HOME is not set, and this user has no account that says where it is; set HOME")
    return Path(home, ".config")


def calibrations() -> Path:
    """Where calibrations of the planner are kept."""
    return config_home() / "cpm-cluster" / "calibration"


def has_slurm() -> bool:
    """Whether sbatch is on PATH."""
    return shutil.which("sbatch") is not None


def submitter() -> Submitter:
    """Whoever types."""
    return Submitter(sys.executable, f"{os.getuid()}:{os.getgid()}")


def surroundings() -> Surroundings:
    """Which cluster Slurm's commands would speak to."""
    from cpm_cluster.sandbox.state import Sandbox

    sandbox = Sandbox().slurm_conf
    return Surroundings(
        has_sbatch=has_slurm(),
        slurm_conf=os.environ.get("SLURM_CONF"),
        has_site_conf=SITE_CONF.exists(),
        sandbox_conf=str(sandbox),
        has_sandbox=sandbox.exists(),
    )
