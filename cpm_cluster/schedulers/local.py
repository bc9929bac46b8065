"""This machine as a scheduler: submitit's local executor holds the node agent, in a session of its own.

submitit's controller keeps the time limit: it sends USR2 ahead of it, as Slurm would. Every process of a run carries
the run's id in its environment, so that none can hide from `is_alive` and `cancel`.
"""

from __future__ import annotations

import fcntl
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cpm_cluster.agent.process_tree import RUN_VARIABLE, carries, end_all, end_with_parent, processes_of_run, send
from cpm_cluster.agent.surroundings import next_attempt
from cpm_cluster.launch.plan import LaunchPlan
from cpm_cluster.launch.sbatch import agent_argv
from cpm_cluster.runs.job_end import JobEnd
from cpm_cluster.runs.records import read_events
from cpm_cluster.runs.run import Run, RunError, Submission, open_run, read_submission, record_submission
from cpm_cluster.schedulers import IsAlive, SchedulerError

NO_LIMIT_MIN = 366 * 24 * 60
# The agent gives the ranks 25 s for their checkpoint.
GRACE_OF_CANCEL_S = 40.0
GRACE_WITHOUT_AGENT_S = 1.0
_CARRIED = f"{RUN_VARIABLE}=".encode()
TRAINER_NEEDS = ("torch", "numpy", "tensorboardX")


class Scheduler:
    """See `schedulers.Scheduler`."""

    def require(self, plan: LaunchPlan) -> str:
        """Linux, and what the trainer imports where it runs with this very Python."""
        if sys.platform != "linux":
            raise SchedulerError("local runs need Linux (prctl and /proc); use a Slurm cluster, or --dry-run")
        missing = [name for name in TRAINER_NEEDS if find_spec(name) is None]
        if missing and plan.trainer is not None and plan.program.python == sys.executable:
            raise SchedulerError(
                f"the trainer needs {', '.join(missing)}, which {sys.executable} does not have;"
                " install them with: pip install 'cpm-cluster[train]'"
            )
        for path in _files_read(plan.trainer or {}):
            if not os.access(path, os.R_OK):
                raise RunError(f"the job names {path}, which is not there or cannot be read")
        return ""

    def submit(self, run: Run) -> Submission:
        """Start submitit's controller, which outlives this process and its terminal."""
        log = run.files.root / "submitit" / "submit.log"
        log.parent.mkdir(exist_ok=True)
        with _alone(run), open(log, "ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(run.files.root)],
                cwd="/",  # -m would import from the user's folder first
                env=surroundings(os.environ, run.id),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            code = process.wait()
        submission = read_submission(run)
        if code != 0 or submission is None:
            raise SchedulerError(f"submitit could not start {run.id}: {_last_line(log)}\n  all of it: {log}")
        return submission

    def is_alive(self, run: Run, submission: Submission) -> bool:
        """Whether a process of the run is left. Of another user's processes only submitit's controller can be told."""
        return _is_alive(run, submission, {run.id} if processes_of_run(run.id) else set())

    def look(self) -> IsAlive:
        """One pass over /proc."""
        living = _living_runs()
        return lambda run, submission: _is_alive(run, submission, living)

    def ended_as(self, run: Run, submission: Submission) -> JobEnd | None:
        """This machine keeps no record of processes that have ended."""
        return None

    def waiting_for(self, run: Run, submission: Submission) -> str:
        """Nothing waits here."""
        return ""

    def warn(self, run: Run, submission: Submission) -> None:
        """As submitit's controller does before the time limit."""
        send(_agents(run), signal.SIGUSR2)

    def cancel(self, run: Run, submission: Submission) -> None:
        """Ask the agent to save and stop; kill what is left after 40 s, or at once where there is no agent yet."""
        if not self.is_alive(run, submission):
            return
        agents = _agents(run)
        send(agents, signal.SIGTERM)
        deadline = time.monotonic() + GRACE_OF_CANCEL_S
        while agents and processes_of_run(run.id) and time.monotonic() < deadline:
            time.sleep(0.1)
        if not end_all(lambda: processes_of_run(run.id), GRACE_WITHOUT_AGENT_S):
            raise SchedulerError(f"processes {processes_of_run(run.id)} of {run.id} do not end, even when killed")


def _is_alive(run: Run, submission: Submission, living: Collection[str]) -> bool:
    """`living` are the runs that a process of this user belongs to."""
    if submission.host != platform.node():
        raise SchedulerError(f"{run.id} was started on {submission.host}; ask there")
    if _is_controller(int(submission.job_id), run) or run.id in living:
        return True
    if os.geteuid() not in (0, run.files.root.stat().st_uid):
        raise SchedulerError(f"{run.id} belongs to another user; only they and root see its processes")
    return False


def _living_runs() -> set[str]:
    """The ids that processes of this user, other than this one, carry in their environment."""
    found: set[str] = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            variables = (folder / "environ").read_bytes().split(b"\0") if folder.name != str(os.getpid()) else []
        except OSError:
            continue
        found |= {os.fsdecode(variable[len(_CARRIED) :]) for variable in variables if variable.startswith(_CARRIED)}
    return found


@contextmanager
def _alone(run: Run) -> Iterator[None]:
    """Refuse a second attempt while one lives, also when both are started at the same moment."""
    with open(run.files.root / "submitit" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if processes_of_run(run.id):
            raise SchedulerError(f"{run.id} runs already; cpm logs -f {run.id} follows it")
        yield


def surroundings(environment: Mapping[str, str], run_id: str) -> dict[str, str]:
    """The variables that a run inherits from the shell; not those of another job around it, such as its node's rank."""
    of_another_job = ("SLURM", "SUBMITIT_", "CPM_ATTEMPT", "CPM_MASTER_")
    return {k: v for k, v in environment.items() if not k.startswith(of_another_job)} | {RUN_VARIABLE: run_id}


def _is_controller(pid: int, run: Run) -> bool:
    """Whether this process is submitit's controller of the run: its command line ends in its folder."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return os.fsencode(run.files.root / "submitit") in words


def _files_read(trainer: Mapping[str, Any]) -> list[str]:
    """The files of the user that the trainer reads; names of what comes with the package are none."""
    data = trainer.get("data", {})
    sources = [source["path"] for use in ("train", "eval") for source in data.get(use, ())]
    named = [*sources, trainer.get("init_from"), trainer.get("adapter"), trainer.get("tokenizer")]
    return [name for name in named if name and name.startswith("/")]


def _agents(run: Run) -> list[int]:
    """The newest attempt's agent, if it is alive."""
    started = [e for e in read_events(run.files.root / "events") if e.get("phase") == "prepare"]
    return [pid for event in started[-1:] if carries(pid := int(event["pid"]), run.id)]


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")


def become_agent(argv: list[str]) -> None:
    """What submitit starts: the node agent in its place, ending when submitit's controller does.

    A replaced process keeps submitit's pid and log, but none of its signal handlers, which ignore SIGTERM.
    """
    end_with_parent(int(os.environ["SUBMITIT_LOCAL_JOB_ID"]))  # the controller's pid, even if it has died already
    os.execv(argv[0], argv)


def start(run: Run) -> None:
    """Submit the agent through submitit, and record it; the job's id is its controller's pid."""
    import submitit

    plan, attempt = run.plan, next_attempt(run.files)
    executor = submitit.LocalExecutor(folder=run.files.root / "submitit")
    executor.update_parameters(
        timeout_min=plan.time_limit_s / 60 if plan.time_limit_s else NO_LIMIT_MIN,
        signal_delay_s=plan.signal_lead_s,
        gpus_per_node=plan.gpus_per_node,
        stderr_to_stdout=True,
    )
    job = executor.submit(become_agent, agent_argv(plan))
    record_submission(run, Submission("local", str(job.job_id), platform.node(), attempt))


if __name__ == "__main__":
    # in a process and session of its own: neither Ctrl-C nor a closed terminal can come between start and record
    start(open_run(Path(sys.argv[1])))
