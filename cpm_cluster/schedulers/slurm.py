"""Slurm: our own script goes in through submitit, squeue says what has become of it, scancel ends it."""

from __future__ import annotations

import os
import platform
import pwd
import re
import shutil
import subprocess
import time
from collections.abc import Iterator

from cpm_cluster.agent.surroundings import newest_attempt, next_attempt
from cpm_cluster.launch.plan import EXIT_STOPPED, LaunchPlan
from cpm_cluster.launch.sbatch import batch_script
from cpm_cluster.runs.job_end import JobEnd, recorded_job_end
from cpm_cluster.runs.run import Run, Submission, record_submission
from cpm_cluster.runs.state import exit_records
from cpm_cluster.schedulers import IsAlive, SchedulerError
from cpm_cluster.schedulers.slurm_accounting import AccountedJob, accounted_jobs
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
# sbatch --test-only: `Job 58 to start at 2026-11-25T14:15:15 using 1 processors on nodes g2001 in partition gpu1`.
EXPECTED_START = re.compile(r"to start at (\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?: using .*? on nodes? (?P<nodes>\S+))?")
AT_ONCE_S = 60
SECONDS_BETWEEN_QUESTIONS = 2.0
# KillWait is 30 s on most sites, and the epilog comes after it.
PATIENCE_OF_CANCEL_S = 120.0


class Scheduler:
    """See `schedulers.Scheduler`."""

    def require(self, plan: LaunchPlan) -> str:
        """sbatch is here, the partition has what the plan asks for, and slurmctld would take the script, and when."""
        if shutil.which("sbatch") is None:
            raise SchedulerError(WITHOUT_SBATCH)
        partition = next((s.value for s in plan.batch if s.name == "partition"), None)
        if partition:
            obstacles = list(_obstacles(plan, partition, node_groups(partition)))
            if obstacles:
                raise SchedulerError("this job could never start:\n  " + "\n  ".join(obstacles))
        return _expected_start(_test_only(plan))

    def submit(self, run: Run) -> Submission:
        """sbatch, through submitit."""
        from cpm_cluster.schedulers.slurm_submitit import submit_script

        attempt = next_attempt(run.files)
        job_id = submit_script(run.files.script, run.files.root / "submitit", client_environment())
        submission = Submission("slurm", job_id, platform.node(), attempt)
        record_submission(run, submission)
        _answers.clear()  # squeue's last answer does not have it yet
        return submission

    def is_alive(self, run: Run, submission: Submission) -> bool:
        """Whether Slurm waits with the job, runs it, or will start it again.

        Raises:
            SchedulerError: it is another user's, this site hides those, and accounting does not know it either.
        """
        owner = _owner(run)
        try:
            job = _ask(owner).get(submission.job_id)
        except SchedulerError:
            return _may_go_on(run, submission)
        if job is not None or os.getuid() in (0, owner):
            return job is not None and job.is_alive
        accounted = _newest(submission.job_id, owner)
        if accounted is None:
            raise SchedulerError(f"{run.id} belongs to {_user(owner)}, and Slurm shows you no job {submission.job_id}")
        return not accounted.has_ended

    def look(self) -> IsAlive:
        """One answer of squeue serves whatever is asked within two seconds."""
        return self.is_alive

    def ended_as(self, run: Run, submission: Submission) -> JobEnd | None:
        """squeue's word while it knows the job, with what accounting adds to it; later that of accounting alone."""
        job_id, owner = submission.job_id, _owner(run)
        try:
            queued = _ask(owner).get(job_id)
        except SchedulerError:
            queued = None
        if queued is not None and queued.is_alive:
            return None
        accounted = _newest(job_id, owner)
        # slurmdbd learns late; until then its newest incarnation may be an earlier one
        if accounted is not None and accounted.has_ended and (queued is None or accounted.state == queued.ended_as):
            who = "" if accounted.cancelled_by is None else _user(accounted.cancelled_by)
            said_by = f"sacct --jobs={job_id}"
            return JobEnd(job_id, accounted.word, said_by, _row(accounted), accounted.nodes, who)
        if queued is None:
            return None
        row = " ".join(filter(None, [queued.ended_as, f"({queued.reason})" if queued.reason else "", queued.nodes]))
        return JobEnd(job_id, queued.ended_as, f"squeue --jobs={job_id}", row, queued.nodes)

    def waiting_for(self, run: Run, submission: Submission) -> str:
        """Slurm's reason, and when it expects to start the job."""
        try:
            job = _ask(_owner(run)).get(submission.job_id)
        except SchedulerError as error:
            return str(error)
        return _reason(job) if job is not None and job.is_waiting else ""

    def warn(self, run: Run, submission: Submission) -> None:
        """Steps get the signal, the batch script does not (man scancel, --signal)."""
        _scancel("--signal=USR2", submission.job_id)

    def cancel(self, run: Run, submission: Submission) -> None:
        """scancel, and wait until Slurm has let go of the job; one that it has let go of already is no error."""
        try:
            _scancel(submission.job_id)
        except SchedulerError:
            if self.is_alive(run, submission):
                raise
            return
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


# The last answer of squeue about each user's jobs, and when it came: one call serves all runs that are looked at then.
_answers: dict[int, tuple[float, dict[str, QueuedJob] | SchedulerError]] = {}


def _ask(user: int) -> dict[str, QueuedJob]:
    """The jobs of a user; raises SchedulerError as `queued_jobs` does, at once where it did so just now."""
    at, answer = _answers.get(user, (0.0, None))
    if answer is None or time.monotonic() - at > SECONDS_BETWEEN_QUESTIONS:
        try:
            answer = queued_jobs(user)
        except SchedulerError as error:
            answer = error
        _answers[user] = (time.monotonic(), answer)
    if isinstance(answer, SchedulerError):
        raise answer
    return answer


def _may_go_on(run: Run, submission: Submission) -> bool:
    """While slurmctld is away: jobs outlive it, so only the records of all nodes tell an end, if nothing follows it."""
    attempt = max(submission.attempt, newest_attempt(run.files))
    if recorded_job_end(run, attempt, submission.job_id) is not None:
        return False
    exits = exit_records(run, attempt)
    return len(exits) < run.plan.nodes or any(record["exit_code"] == EXIT_STOPPED for record in exits)


def _newest(job_id: str, user: int) -> AccountedJob | None:
    incarnations = accounted_jobs([job_id], user).get(job_id)
    return incarnations[-1] if incarnations else None


def _row(job: AccountedJob) -> str:
    """What accounting says, with the steps that ended otherwise than well."""
    steps = [f"step {s.step} {s.state} {s.exit_code}:{s.signal}" for s in job.steps if s.state != "COMPLETED"]
    return "; ".join([job.row, *steps])


def _owner(run: Run) -> int:
    """Whose job it is: the run directory is its owner's."""
    return run.files.root.stat().st_uid


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"


def _reason(job: QueuedJob) -> str:
    start = time.strftime("%F %H:%M", time.localtime(int(job.start))) if job.start.isdigit() else job.start
    why = "" if job.reason == "None" else f" ({job.reason})"  # Slurm has not looked at it yet
    return f"waiting{why}" + (f", start expected {start}" if start else "")


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


def _test_only(plan: LaunchPlan) -> str:
    """What sbatch --test-only says: slurmctld's own word, without a job; raises SchedulerError where it refuses."""
    argv = ["sbatch", "--test-only"]
    script = batch_script(plan)
    done = subprocess.run(argv, input=script, capture_output=True, text=True, env=client_environment())
    said = " ".join(done.stderr.split())
    if done.returncode == 0:
        return said
    key = next((key for pattern, key in REFUSALS if re.search(pattern, said)), None)
    raise SchedulerError(f"Slurm refuses this job: {said}" + (f"\n  the key to change: {key}" if key else ""))


def _expected_start(said: str) -> str:
    """A sentence from what --test-only says; empty where it says no time."""
    found = EXPECTED_START.search(said)
    if found is None:
        return ""
    start = time.mktime(time.strptime(found[1], "%Y-%m-%dT%H:%M:%S"))
    when = "at once" if start - time.time() < AT_ONCE_S else f"at {time.strftime('%F %H:%M', time.localtime(start))}"
    return f"Slurm expects to start it {when}" + (f", on {found['nodes']}" if found["nodes"] else "")
