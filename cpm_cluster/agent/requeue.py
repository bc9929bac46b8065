"""Before and after an attempt, in the batch script on the first node: the verdict, and another start where that helps.

Slurm itself requeues a job that it preempts, or whose node fails; it kills the batch script then, so that the next
attempt records how the one before it ended.
"""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

from cpm_cluster.agent import containers
from cpm_cluster.agent.surroundings import newest_attempt, next_attempt
from cpm_cluster.diagnosis.diagnose import diagnose
from cpm_cluster.diagnosis.retry import BUDGETS, Decision, decide, read_endings
from cpm_cluster.diagnosis.verdict import Verdict
from cpm_cluster.launch.plan import options
from cpm_cluster.runs.records import append_event, read_events
from cpm_cluster.runs.run import Run, Submission, open_run, read_submission, record_submission, write_submission
from cpm_cluster.runs.state import exit_records, read_state

WRITER = "batch"
EXIT_FAILED = 1
PATIENCE_WITH_SLURM_S = 30.0
PATIENCE_WITH_CLEANING_S = 120.0


def begin(run_dir: Path) -> int:
    """Whether Slurm's own restart of the job may go on: 0, or 1 when such restarts have used the budget up."""
    refusal = _refusal(open_run(run_dir))
    if refusal:
        print(f"cpm: no further attempt: {refusal}", file=sys.stderr, flush=True)
        return EXIT_FAILED
    return 0


def take_over(run_dir: Path, job: str, attempt: int) -> None:
    """A script that somebody gave to sbatch by hand makes its job the run's."""
    run = open_run(run_dir)
    submission = read_submission(run)
    if submission is None or submission.job_id != job:
        record_submission(run, Submission("slurm", job, platform.node(), attempt))


def _refusal(run: Run) -> str | None:
    state = read_state(run, alive=False)
    known = read_endings(read_events(run.files.root / "events"))
    verdict = diagnose(run, state)
    if not state.attempt or verdict is None or any(ending.attempt == state.attempt for ending in known):
        return None
    decision = _decided(run, state.attempt, verdict)
    return decision.why if verdict.category in BUDGETS and not decision.again else None


def end(run_dir: Path, code: int) -> int:
    """Explain the attempt that just ended, start the job again where that may help; the exit code of the job."""
    # requeueing ends this script; what is left to do then must still happen
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    run = open_run(run_dir)
    attempt = newest_attempt(run.files)
    if len(exit_records(run, attempt)) < run.plan.nodes and containers.is_used(run.plan):
        _clean_up(run)
    told_to_end = any(record.get("stopped_by") == "SIGTERM" for record in exit_records(run, attempt))
    if told_to_end and _is_preempted():
        append_event(run.files.events(WRITER), "preempted", attempt=attempt)
    state = read_state(run, alive=False)
    verdict = diagnose(run, state)
    if verdict is None:
        return code
    decision = _decided(run, state.attempt, verdict)
    told = f"starting again: {decision.why}" if decision.again else f"{decision.why}\n  what to do: {verdict.remedy}"
    print(f"cpm: {verdict.cause}\ncpm: {told}", file=sys.stderr, flush=True)
    if decision.again:
        _start_again(run, decision)
    return state.exit_code or code


def _clean_up(run: Run) -> None:
    """On nodes whose agent and guard are gone: a Docker of root holds on to its containers, others to their files."""
    argv = ["srun", *options(run.plan.step), sys.executable, str(run.files.package), str(run.files.root), "clean"]
    try:
        subprocess.run(argv, stdin=subprocess.DEVNULL, timeout=PATIENCE_WITH_CLEANING_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        print(f"cpm: not all nodes could be cleaned up: {error}", file=sys.stderr, flush=True)


def _is_preempted() -> bool:
    """Whether Slurm is taking the nodes from this job, which has a grace time to end in: only the job's entry says so.

    scontrol writes PreemptTime=None, or a moment in ISO 8601 as all of them.
    """
    argv = ["scontrol", "--oneliner", "show", "job", os.environ.get("SLURM_JOB_ID", "")]
    try:
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, timeout=PATIENCE_WITH_SLURM_S)
    except (OSError, subprocess.TimeoutExpired):
        return False
    told = dict(word.split("=", 1) for word in done.stdout.decode("utf-8", "replace").split() if "=" in word)
    preempted = told.get("PreemptTime", "None")
    return preempted[:1].isdigit() and preempted >= told.get("StartTime", "")


def _decided(run: Run, attempt: int, verdict: Verdict) -> Decision:
    events = run.files.events(WRITER)
    at_fault = verdict.node if verdict.transient else None
    told = {"category": verdict.category, "cause": verdict.cause, "step": _checkpoint_step(run), "node": at_fault}
    append_event(events, "ending", attempt=attempt, **told)
    known = read_events(run.files.root / "events")
    submitted = max((event["time"] for event in known if event["kind"] == "submitted"), default=0.0)
    decision = decide(verdict, read_endings(known), submitted)
    append_event(events, "decision", attempt=attempt, **vars(decision))
    return decision


def _checkpoint_step(run: Run) -> int:
    try:
        return int((run.files.root / "checkpoints" / "latest").read_text().strip().rpartition("-")[2])
    except (OSError, ValueError):
        return 0


def _start_again(run: Run, decision: Decision) -> None:
    job = os.environ["SLURM_JOB_ID"]
    avoid = _excluded(run, decision)
    if not run.plan.requeue:
        exclude = [f"--exclude={avoid}"] if avoid else []
        said = _slurm(run, ["sbatch", "--parsable", f"--dependency=afterany:{job}", *exclude, str(run.files.script)])
        if said is not None:
            new_job = said.strip().split(";")[0]
            write_submission(run, Submission("slurm", new_job, platform.node(), next_attempt(run.files)))
    elif _slurm(run, ["scontrol", "requeue", job]) is not None and avoid:
        _slurm(run, ["scontrol", "update", f"JobId={job}", f"ExcNodeList={avoid}"])


def _excluded(run: Run, decision: Decision) -> str:
    """The nodes to leave out, with those that the job leaves out itself; where it names its nodes, none."""
    named = {setting.name: setting.value or "" for setting in run.plan.batch}
    if "nodelist" in named:
        return ""
    return ",".join(filter(None, [named.get("exclude"), *decision.avoid])) if decision.avoid else ""


def _slurm(run: Run, argv: list[str]) -> str | None:
    """What a command of Slurm's prints; None where it fails, after telling the user."""
    environment = {k: v for k, v in os.environ.items() if k == "SLURM_CONF" or not k.startswith(("SLURM_", "SBATCH_"))}
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=environment)
    if done.returncode != 0:
        print(f"cpm: {' '.join(argv)} failed; to go on: sbatch {run.files.script}", file=sys.stderr, flush=True)
        return None
    return done.stdout.decode("utf-8", "replace")
