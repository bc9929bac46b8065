"""The batch script's questions, with stand-ins for scontrol and sbatch that record how they are called."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from made_runs import container
from processes import ROOT

from cpm_cluster.agent.requeue import take_over
from cpm_cluster.launch.plan import Setting
from cpm_cluster.runs.records import read_events
from cpm_cluster.runs.run import Submission, read_submission, record_submission

STAND_IN = """\
#!/bin/sh
case "$1" in
    --oneliner) cat {job}; exit ;;
    --parsable) echo 4712 ;;
esac
echo "$(basename "$0") $*" >> {calls}
exit {code}
"""


@pytest.fixture
def slurm(tmp_path, made_run):
    """Makes a run in Slurm's hands; `ask(run, "end", "85")` calls the agent as its batch script does."""
    folder, calls, job = tmp_path / "bin", tmp_path / "calls", tmp_path / "job"
    folder.mkdir()
    job.write_text("JobId=4711 StartTime=2026-01-02T03:04:05 PreemptTime=None\n")

    class Slurm:
        def __init__(self):
            self.answer(0)

        def answer(self, code):
            for name in ("scontrol", "sbatch", "srun"):
                (folder / name).write_text(STAND_IN.format(calls=calls, code=code, job=job))
                (folder / name).chmod(0o755)

        def run(self, *, requeue=True, batch=(), nodes=1, trainer=True, **plan):
            made = made_run(scheduler="slurm", requeue=requeue, batch=batch, nodes=nodes, trainer=trainer, **plan)
            record_submission(made.run, Submission("slurm", "4711", "login"))
            (made.run.files.root / "attempt-1").mkdir()
            return made.phase("prepare").phase("training")

        def ask(self, made, *words, **variables):
            argv = [sys.executable, "-m", "cpm_cluster.agent", str(made.run.files.root), *words]
            environment = {"PATH": f"{folder}:/usr/bin:/bin", "PYTHONPATH": str(ROOT), "SLURM_JOB_ID": "4711"}
            return subprocess.run(argv, env={**environment, **variables}, capture_output=True, text=True, timeout=30)

        def preempts(self):
            job.write_text("JobId=4711 StartTime=2026-01-02T03:04:05 PreemptTime=2026-01-02T04:00:00\n")

        @property
        def calls(self):
            return calls.read_text().splitlines() if calls.exists() else []

    return Slurm()


def stopped(made, attempt=1):
    return made.phase("training", attempt).exited(85, attempt, stopped_by="SIGUSR2")


def events(made, kind):
    return [event for event in read_events(made.run.files.root / "events") if event["kind"] == kind]


def checkpoint(made, step):
    return made.file("checkpoints/latest", f"step-{step}")


def test_a_job_that_finished_is_left_alone(slurm):
    done = slurm.ask(slurm.run().exited(0), "end", "0")
    assert (done.returncode, slurm.calls, done.stderr) == (0, [], "")


def test_a_job_that_stopped_with_a_checkpoint_is_requeued(slurm):
    made = stopped(checkpoint(slurm.run(), 40))
    done = slurm.ask(made, "end", "85")
    assert done.returncode == 85
    assert slurm.calls == ["scontrol requeue 4711"]
    assert "saved and stopped before its time limit" in done.stderr
    assert "starting again: start 1 of at most 3 without a new checkpoint" in done.stderr
    (ending,) = events(made, "ending")
    assert (ending["category"], ending["step"], ending["attempt"]) == ("time limit", 40, 1)


def test_a_preempted_job_that_had_the_time_to_save_is_told_from_one_that_somebody_ended(slurm):
    ended = slurm.run().exited(143, stopped_by="SIGTERM")
    assert "by something else than cpm cancel" in slurm.ask(ended, "end", "143").stderr
    assert slurm.calls == []
    slurm.preempts()
    assert "Slurm preempted it for another job" in slurm.ask(ended, "end", "143").stderr
    assert slurm.calls == ["scontrol requeue 4711"]


def test_nodes_that_nobody_cleaned_up_are_cleaned(slurm):
    """A container of root's Docker outlives the step: with agent and guard gone, nobody else would remove it."""
    step = (Setting("nodes", "2", "job"),)
    made = slurm.run(nodes=2, container=container(image="img:1"), runtime="docker", step=step)
    slurm.ask(made.exited(137, node="g2001"), "end", "137")
    package = made.run.files.package
    assert slurm.calls[0] == f"srun --nodes=2 {sys.executable} {package} {made.run.files.root} clean"


def test_a_mistake_of_the_user_is_not_repeated(slurm):
    made = slurm.run().rank_error(1, 5.0, user_error=True).exited(2)
    done = slurm.ask(made, "end", "1")
    assert (done.returncode, slurm.calls) == (2, [])
    assert "the same job would end like this again\n  what to do: correct the data" in done.stderr


def test_nor_is_a_cancelled_job(slurm):
    done = slurm.ask(stopped(slurm.run().cancelled()), "end", "85")
    assert (done.returncode, slurm.calls) == (85, [])


def test_a_node_at_fault_is_left_out_of_the_next_attempt(slurm):
    exclude = (Setting("exclude", "g2008", "job"),)
    made = slurm.run(batch=exclude, nodes=2).event("error", "g2003", attempt=1, message="no GPU", blamed=["g2003"])
    made.exited(3, node="g2003").exited(143, node="g2004", ended=2.0)
    done = slurm.ask(made, "end", "143")
    assert done.returncode == 3
    assert slurm.calls == ["scontrol requeue 4711", "scontrol update JobId=4711 ExcNodeList=g2008,g2003"]


def test_but_not_where_the_job_names_its_nodes(slurm):
    made = slurm.run(batch=(Setting("nodelist", "g2003", "job"),))
    made.event("error", "g2003", attempt=1, message="no GPU", blamed=["g2003"]).exited(3, node="g2003")
    slurm.ask(made, "end", "3")
    assert slurm.calls == ["scontrol requeue 4711"]


def test_where_the_site_does_not_requeue_a_new_job_follows_and_is_the_runs(slurm):
    made = stopped(slurm.run(requeue=False))
    slurm.ask(made, "end", "85")
    script = made.run.files.script
    assert slurm.calls == [f"sbatch --parsable --dependency=afterany:4711 {script}"]
    submission = read_submission(made.run)
    assert (submission.job_id, submission.attempt) == ("4712", 2)


def test_where_slurm_refuses_it_says_how_to_go_on(slurm):
    slurm.answer(1)
    made = stopped(slurm.run())
    done = slurm.ask(made, "end", "85")
    assert done.returncode == 85
    assert f"scontrol requeue 4711 failed; to go on: sbatch {made.run.files.script}" in done.stderr


def test_without_progress_it_is_not_started_for_ever(slurm):
    made = checkpoint(slurm.run(), 40)
    for attempt in range(1, 5):
        stopped(made, attempt)
        done = slurm.ask(made, "end", "85")
    assert slurm.calls == ["scontrol requeue 4711"] * 3
    assert "it ended like this 4 times (time limit) without a new checkpoint" in done.stderr


def test_progress_gives_the_budget_back(slurm):
    made = slurm.run()
    for attempt in range(1, 7):
        slurm.ask(stopped(checkpoint(made, 10 * attempt), attempt), "end", "85")
    assert len(slurm.calls) == 6


def test_a_script_that_somebody_submitted_by_hand_is_a_run_like_any_other(made_run):
    made = made_run(scheduler="slurm")
    take_over(made.run.files.root, "4711", 1)
    assert read_submission(made.run).job_id == "4711"
    assert [event["job_id"] for event in events(made, "submitted")] == ["4711"]
    take_over(made.run.files.root, "4711", 2)
    assert len(events(made, "submitted")) == 1


def test_what_slurm_ended_and_requeued_itself_is_recorded_by_the_next_attempt(slurm):
    made = slurm.run().exited(143, stopped_by="SIGTERM")
    said = "slurmstepd: error: *** JOB 4711 ON g2001 CANCELLED AT 2026-01-02T03:04:05 DUE TO PREEMPTION ***"
    made.file("slurm-4711.log", f"cpm: attempt 1 begins\n{said}\n")
    assert slurm.ask(made, "begin").returncode == 0
    assert [event["category"] for event in events(made, "ending")] == ["preempted"]


def test_slurms_own_requeues_have_an_end_too(slurm):
    made = slurm.run()
    log = ""
    for attempt in range(1, 6):
        made.phase("training", attempt).exited(143, attempt, node="g2001", stopped_by="SIGTERM")
        (made.run.files.root / f"attempt-{attempt}").mkdir(exist_ok=True)
        said = "*** STEP 4711.0 ON g2001 CANCELLED AT 2026-01-02T03:04:05 DUE TO NODE FAILURE ***"
        log += f"cpm: attempt {attempt} begins\nslurmstepd: error: {said}\nsrun: error: Node failure on g2002\n"
        made.file("slurm-4711.log", log)
        done = slurm.ask(made, "begin")
    assert done.returncode == 1
    assert done.stderr == "cpm: no further attempt: it ended like this 5 times (node) without a new checkpoint\n"
    assert {event["node"] for event in events(made, "ending")} == {"g2002"}


def test_what_a_person_has_slurm_restart_is_let_go_on(slurm):
    """`scontrol requeue` after a mistake of the user's: whoever does that knows why."""
    made = slurm.run().exited(1).rank_error(0, 1.0)
    assert slurm.ask(made, "begin").returncode == 0


def test_the_end_of_the_script_that_requeueing_brings_does_not_interrupt_it(slurm, tmp_path):
    """Slurm ends the script as soon as the job is requeued: the nodes to leave out must still be told."""
    scontrol = tmp_path / "bin" / "scontrol"
    made = slurm.run().event("error", "g2003", attempt=1, message="x", blamed=["g2003"]).exited(3, node="g2003")
    kill = f"kill -{int(signal.SIGTERM)} $PPID\n"
    scontrol.write_text(scontrol.read_text().replace("exit 0", kill + "exit 0"))
    assert slurm.ask(made, "end", "3").returncode == 3
    assert len(slurm.calls) == 2
    assert os.access(scontrol, os.X_OK)
