"""This machine as a scheduler: submitit's local executor holds the node agent, in a session of its own.

submitit's controller keeps the time limit: it sends USR2 ahead of it, as Slurm would. Every process of a run carries
the run's id in its environment, so that none can hide from `is_alive` and `cancel`.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

from cpm_cluster.agent.process_tree import RUN_VARIABLE, end_all, end_with_parent, processes_of_run, send
from cpm_cluster.launch.plan import LaunchPlan
from cpm_cluster.launch.sbatch import agent_argv
from cpm_cluster.runs.records import read_events
from cpm_cluster.runs.run import Run, Submission
from cpm_cluster.schedulers import SchedulerError

NO_LIMIT_MIN = 366 * 24 * 60
# The agent gives the ranks 25 s for their checkpoint.
GRACE_OF_CANCEL_S = 40.0


class Scheduler:
    """See `schedulers.Scheduler`."""

    def require(self) -> None:
        """Nothing is needed but Linux."""
        if sys.platform != "linux":
            raise SchedulerError("local runs need Linux (prctl and /proc); use a Slurm cluster, or --dry-run")

    def submit(self, run: Run) -> Submission:
        """Start submitit's controller, which outlives this process and its terminal."""
        environment = {**os.environ, RUN_VARIABLE: run.id}
        environment.pop("CPM_ATTEMPT", None)
        log = run.files.root / "submitit" / "submit.log"
        log.parent.mkdir(exist_ok=True)
        with open(log, "ab") as errors:
            done = subprocess.run(
                [sys.executable, "-m", __name__, str(run.files.root)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )
        if done.returncode != 0:
            raise SchedulerError(f"submitit could not start the run; see {log}")
        return Submission("local", str(json.loads(done.stdout)["job_id"]), platform.node())

    def is_alive(self, run: Run, submission: Submission) -> bool:
        """Whether a process of the run is left."""
        if submission.host != platform.node():
            raise SchedulerError(f"{run.id} was started on {submission.host}; ask there")
        return bool(processes_of_run(run.id))

    def cancel(self, run: Run, submission: Submission) -> None:
        """Ask the agent to save and stop; kill what is left after 40 s."""
        if not self.is_alive(run, submission):
            return
        left = processes_of_run(run.id)
        agents = [int(e["pid"]) for e in read_events(run.files.root / "events") if e.get("phase") == "prepare"]
        # a run that has no agent yet is only submitit's controller, which passes the signal on
        send([pid for pid in agents if pid in left] or left, 15)
        deadline = time.monotonic() + GRACE_OF_CANCEL_S
        while processes_of_run(run.id) and time.monotonic() < deadline:
            time.sleep(0.1)
        if not end_all(lambda: processes_of_run(run.id), 1.0):
            raise SchedulerError(f"processes {processes_of_run(run.id)} of {run.id} do not end, even when killed")


def become_agent(argv: list[str]) -> None:
    """What submitit starts: the node agent in its place, ending when submitit's controller does.

    A replaced process keeps submitit's pid and log, but none of its signal handlers, which ignore SIGTERM.
    """
    end_with_parent(os.getppid())
    os.execv(argv[0], argv)


def start(run_dir: Path) -> str:
    """Submit the agent through submitit; the job's id, which is its controller's pid."""
    import submitit

    plan = LaunchPlan.from_json((run_dir / "launch.json").read_text(encoding="utf-8"))
    executor = submitit.LocalExecutor(folder=run_dir / "submitit")
    executor.update_parameters(
        timeout_min=plan.time_limit_s / 60 if plan.time_limit_s else NO_LIMIT_MIN,
        signal_delay_s=plan.signal_lead_s,
        gpus_per_node=plan.gpus_per_node,
        stderr_to_stdout=True,
    )
    return str(executor.submit(become_agent, agent_argv(plan)).job_id)


def main() -> None:
    """Print the job's id. The controller must not inherit the pipe: whoever reads it would wait for the run's end."""
    with os.fdopen(os.dup(1), "w") as answer, open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        answer.write(json.dumps({"job_id": start(Path(sys.argv[1]))}))


if __name__ == "__main__":
    main()
