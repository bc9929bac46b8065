"""Slurm, reached through a script that plain sbatch takes; cpm-submit itself does not submit to it yet."""

from __future__ import annotations

import shutil

from cpm_cluster.launch.plan import LaunchPlan
from cpm_cluster.runs.run import Run, Submission
from cpm_cluster.schedulers import SchedulerError

WITHOUT_SBATCH = """\
this job is for a Slurm cluster, and there is no sbatch on this machine's PATH
  to see what would run there:      cpm-submit JOB --dry-run
  to run it, on a login node:       cpm-submit JOB --export job.sbatch; sbatch job.sbatch
  to rehearse the trainer here:     cpm-submit jobs/quickstart.yaml (2 processes on the CPU)"""

WITH_SBATCH = """\
cpm-submit does not submit to Slurm itself yet
  write the script:                 cpm-submit JOB --export job.sbatch
  submit it:                        sbatch job.sbatch"""


class Scheduler:
    """See `schedulers.Scheduler`."""

    def require(self, plan: LaunchPlan) -> None:
        """Always raises: it says what one can do instead."""
        raise SchedulerError(WITH_SBATCH if shutil.which("sbatch") else WITHOUT_SBATCH)

    def submit(self, run: Run) -> Submission:
        """Never reached: `require` raises first."""
        raise SchedulerError(WITH_SBATCH)

    def is_alive(self, run: Run, submission: Submission) -> bool:
        """Ask Slurm."""
        raise SchedulerError(f"ask Slurm: squeue --job {submission.job_id}")

    def cancel(self, run: Run, submission: Submission) -> None:
        """Ask Slurm."""
        raise SchedulerError(f"ask Slurm: scancel {submission.job_id}")
