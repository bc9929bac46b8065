"""Slurm: our own script goes in through submitit, squeue says what has become of it, scancel ends it."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from functools import lru_cache

from cpm_cluster.agent.surroundings import next_attempt
from cpm_cluster.launch.plan import LaunchPlan
from cpm_cluster.launch.sbatch import batch_script
from cpm_cluster.runs.run import Run, Submission, write_submission
from cpm_cluster.runs.state import exit_records
from cpm_cluster.schedulers import SchedulerError
from cpm_cluster.schedulers.slurm_queue import NodeGroup, QueuedJob, client_environment, node_groups, queued_jobs

WITHOUT_SBATCH = """\
this job is for a Slurm cluster, and there is no sbatch on this machine's PATH
  to see what would run there:     cpm-submit JOB --dry-run
  to run it, on a login node:      cpm-submit JOB; or cpm-submit JOB --export job.sbatch, then sbatch job.sbatch
  to rehearse it on this machine:  cpm-submit JOB --rehearse; after cpm sandbox up, on a small Slurm cluster of its own
  to try the trainer alone:        cpm-submit jobs/quickstart.yaml (2 processes on the CPU)"""

# What slurmctld says to a job that it will not take, and the key of the job file that it means.
REFUSALS = (
    (r"partition", "slurm.partition"),
    (r"account", "slurm.account"),
    (r"qos|QOS", "slurm.qos"),
    (r"reservation", "slurm.reservation"),
    (r"node name|node.*list", "slurm.nodelist"),
    (r"gres|GRES|generic resource", "resources.gpus_per_node (or gpu_request of the cluster file)"),
    (r"[Mm]emory", "resources.memory_per_node"),
    (r"time limit", "time_limit"),
    (r"[Nn]ode count|node configuration", "resources (nodes, GPUs, CPUs or memory of a node)"),
)
SECONDS_BETWEEN_QUESTIONS = 2.0
# KillWait is 30 s on most sites, and the epilog comes after it.
PATIENCE_OF_CANCEL_S = 120.0


class Scheduler:
    """See `schedulers.Scheduler`."""

    def require(self, plan: LaunchPlan) -> None:
        """sbatch is here, the partition has what the plan asks for, and slurmctld would take the script."""
        if shutil.which("sbatch") is None:
            raise SchedulerError(WITHOUT_SBATCH)
        partition = next((s.value for s in plan.batch if s.name == "partition"), None)
        if partition:
            obstacles = list(_obstacles(plan, partition, node_groups(partition)))
            if obstacles:
                raise SchedulerError("this job could never start:\n  " + "\n  ".join(obstacles))
        _test_only(plan)

    def submit(self, run: Run) -> Submission:
        """sbatch, through submitit."""
        from cpm_cluster.schedulers.slurm_submitit import submit_script

        attempt = next_attempt(run.files)
        job_id = submit_script(run.files.script, run.files.root / "submitit", client_environment())
        submission = Submission("slurm", job_id, platform.node(), attempt)
        write_submission(run, submission)
        return submission

    def is_alive(self, run: Run, submission: Submission) -> bool:
        """Whether Slurm waits with the job, runs it, or will start it again.

        While slurmctld is away, a job without an exit record of every node counts as alive: jobs outlive slurmctld.
        """
        try:
            job = _ask().get(submission.job_id)
        except SchedulerError:
            return len(exit_records(run, submission.attempt)) < run.plan.nodes
        return job is not None and job.is_alive

    def waiting_for(self, run: Run, submission: Submission) -> str:
        """Slurm's reason, and when it expects to start the job."""
        try:
            job = _ask().get(submission.job_id)
        except SchedulerError as error:
            return str(error)
        return _reason(job) if job is not None and job.is_waiting else ""

    def warn(self, run: Run, submission: Submission) -> None:
        """Steps get the signal, the batch script does not (man scancel, --signal)."""
        _scancel("--signal=USR2", submission.job_id)

    def cancel(self, run: Run, submission: Submission) -> None:
        """scancel, and wait until Slurm has let go of the job."""
        _scancel(submission.job_id)
        deadline = time.monotonic() + PATIENCE_OF_CANCEL_S
        while self.is_alive(run, submission):
            if time.monotonic() > deadline:
                raise SchedulerError(f"Slurm still holds job {submission.job_id}; squeue --job {submission.job_id}")
            time.sleep(SECONDS_BETWEEN_QUESTIONS)


def _scancel(*arguments: str) -> None:
    argv = ["scancel", *arguments]
    done = subprocess.run(argv, capture_output=True, text=True, env=client_environment())
    if done.returncode != 0:
        raise SchedulerError(f"{' '.join(argv)}: {done.stderr.strip()}")


def _ask() -> dict[str, QueuedJob]:
    """This user's jobs; one call of squeue serves all runs that are looked at within two seconds."""
    return _asked_at(int(time.monotonic() / SECONDS_BETWEEN_QUESTIONS))


@lru_cache(maxsize=1)
def _asked_at(moment: int) -> dict[str, QueuedJob]:
    return queued_jobs(os.getuid())


def _reason(job: QueuedJob) -> str:
    start = time.strftime("%F %H:%M", time.localtime(int(job.start))) if job.start.isdigit() else job.start
    return f"waiting ({job.reason})" + (f", start expected {start}" if start else "")


def _obstacles(plan: LaunchPlan, partition: str, groups: list[NodeGroup]) -> Iterator[str]:
    """What the partition can never give, each with the key to change; slurmctld would let some of it wait for ever."""
    if not groups:
        yield f"slurm.partition: Slurm knows no partition {partition}"
        return
    if not any(group.available for group in groups):
        yield f"slurm.partition: {partition} is down"
    limits = [group.max_time_s for group in groups]
    longest = None if None in limits else max(limit or 0 for limit in limits)
    if longest is not None and (plan.time_limit_s or 0) > longest:
        yield f"time_limit: {plan.time_limit_s} s, but {partition} allows {longest} s; a run resumes, so ask for less"
    if plan.nodes > sum(group.nodes for group in groups):
        yield f"resources.nodes: {plan.nodes}, but {partition} has {sum(group.nodes for group in groups)}"
    most_gpus = max(group.gpus for group in groups)
    if plan.gpus_per_node > most_gpus:
        yield f"resources.gpus_per_node: {plan.gpus_per_node}, but a node of {partition} has {most_gpus}"
    yield from _memory_obstacle(plan, partition, groups)


def _memory_obstacle(plan: LaunchPlan, partition: str, groups: list[NodeGroup]) -> Iterator[str]:
    asked = next((s.value or "" for s in plan.batch if s.name == "mem"), "")
    most = max(group.memory_bytes for group in groups) >> 20
    if asked.endswith("M") and int(asked[:-1]) > most:
        yield f"resources.memory_per_node: {asked[:-1]} MiB, but a node of {partition} has {most} MiB"


def _test_only(plan: LaunchPlan) -> None:
    """sbatch --test-only: slurmctld's own word, without a job."""
    argv = ["sbatch", "--test-only"]
    script = batch_script(plan)
    done = subprocess.run(argv, input=script, capture_output=True, text=True, env=client_environment())
    if done.returncode == 0:
        return
    said = " ".join(done.stderr.split())
    key = next((key for pattern, key in REFUSALS if re.search(pattern, said)), None)
    raise SchedulerError(f"Slurm refuses this job: {said}" + (f"\n  the key to change: {key}" if key else ""))
