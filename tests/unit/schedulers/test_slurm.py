"""Slurm as the scheduler: what is refused before the queue, what is submitted, what lives, how it ended."""

from __future__ import annotations

import json
import os
import pwd
import time

import pytest
from slurm_clients import SlurmClients, accounted, job, queued

from cpm_cluster.launch.plan import EXIT_STOPPED, Setting
from cpm_cluster.launch.sbatch import batch_script
from cpm_cluster.runs.job_end import JobEnd, record_job_end
from cpm_cluster.runs.run import Submission, read_submission, write_submission
from cpm_cluster.schedulers import SchedulerError, open_scheduler, slurm

SUBMISSION = Submission("slurm", "7", "login-1")
# A partition of eight nodes with eight GPUs, 64 CPUs and 512 GiB each; seven days.
GPU1 = "gpu1\t8\tgpu:8\t64\t524288\t7-00:00:00\tup\n"
AWAY = json.dumps({"errors": [{"description": "Failed while looking for jobs", "error_number": -1}], "jobs": []})
ME = pwd.getpwuid(os.getuid()).pw_name


@pytest.fixture
def clients(tmp_path, monkeypatch):
    """This machine's Slurm: partition gpu1, no jobs."""
    stand_ins = SlurmClients(tmp_path / "clients")
    monkeypatch.setenv("PATH", str(stand_ins.bin))
    monkeypatch.setattr(slurm, "SECONDS_BETWEEN_QUESTIONS", 0.01)
    slurm._answers.clear()
    stand_ins.says("sinfo", GPU1)
    stand_ins.says("squeue", queued())
    return stand_ins


@pytest.fixture
def scheduler(clients):
    return open_scheduler("slurm")


@pytest.fixture
def made(made_run):
    """A run of one node on gpu1 that Slurm has taken as job 7."""
    found = made_run(scheduler="slurm", batch=directives())
    write_submission(found.run, SUBMISSION)
    return found


def directives(**changes):
    return tuple(Setting(name, value, "job") for name, value in ({"partition": "gpu1"} | changes).items())


class TestBeforeTheQueue:
    def test_a_machine_without_sbatch_is_told_every_other_way(self, scheduler, clients, made):
        clients.remove("sbatch")
        with pytest.raises(SchedulerError) as caught:
            scheduler.require(made.run.plan)
        for way in ("--dry-run", "--export job.sbatch", "--rehearse", "jobs/quickstart.yaml"):
            assert way in str(caught.value)

    def test_slurmctld_gets_the_very_script_of_the_submission(self, scheduler, clients, made):
        scheduler.require(made.run.plan)
        assert clients.calls("sbatch") == [["--test-only"]]
        assert clients.stdin("sbatch") == batch_script(made.run.plan)

    @pytest.mark.parametrize(
        ("plan", "sinfo", "told"),
        [
            ({}, "", "slurm.partition: Slurm knows no partition gpu1"),
            ({}, GPU1.replace("up", "down"), "slurm.partition: gpu1 is down"),
            ({"time_limit_s": 700_000}, GPU1, "time_limit: 700000 s, but gpu1 allows 604800 s; a run resumes"),
            ({"nodes": 9}, GPU1, "resources.nodes: 9, but gpu1 has 8"),
            ({"gpus_per_node": 9}, GPU1, "resources.gpus_per_node: 9, but a node of gpu1 has 8"),
            (
                {"batch": directives(mem="524289M")},
                GPU1,
                "resources.memory_per_node: 524289 MiB, but a node of gpu1 has 524288 MiB",
            ),
        ],
    )
    def test_what_the_partition_can_never_give_names_the_key(self, scheduler, clients, made_run, plan, sinfo, told):
        """slurmctld would let some of it wait for ever, so it is not even asked."""
        clients.says("sinfo", sinfo)
        with pytest.raises(SchedulerError, match=r"^this job could never start:\n") as caught:
            scheduler.require(made_run(scheduler="slurm", **({"batch": directives()} | plan)).run.plan)
        assert told in str(caught.value)
        assert clients.calls("sbatch") == []

    def test_all_of_it_is_told_at_once(self, scheduler, made_run):
        plan = made_run(scheduler="slurm", batch=directives(), nodes=9, gpus_per_node=16).run.plan
        with pytest.raises(SchedulerError, match=r"resources\.nodes: 9[^\n]*\n  resources\.gpus_per_node: 16"):
            scheduler.require(plan)

    def test_what_any_group_of_nodes_has_is_there(self, scheduler, clients, made_run):
        """sinfo has a line for nodes that are alike; a site's own lines are passed over."""
        clients.says("sinfo", "odd line\n" + GPU1 + "gpu1\t2\tgpu:h100:16(S:0-1)\t64+\t1048576+\tinfinite\tup\n")
        plan = {"nodes": 10, "gpus_per_node": 16, "time_limit_s": 10**7, "batch": directives(mem="1048576M")}
        scheduler.require(made_run(scheduler="slurm", **plan).run.plan)

    def test_the_default_partition_is_left_to_slurmctld(self, scheduler, clients, made_run):
        scheduler.require(made_run(scheduler="slurm").run.plan)
        assert clients.calls("sinfo") == []

    @pytest.mark.parametrize(
        ("said", "key"),
        [
            ("invalid partition specified: gpu9", "slurm.partition"),
            ("Invalid account or account/partition combination specified", "slurm.partition"),
            ("Invalid account", "slurm.account"),
            ("Invalid qos specification", "slurm.qos"),
            ("Requested reservation is invalid", "slurm.reservation"),
            ("Invalid node name specified", "slurm.nodelist"),
            ("Invalid generic resource (gres) specification", "resources.gpus_per_node"),
            ("Memory specification can not be satisfied", "resources.memory_per_node"),
            ("Requested time limit is invalid (missing or exceeds some limit)", "time_limit"),
            ("Requested node configuration is not available", "resources (nodes, GPUs, CPUs or memory of a node)"),
        ],
    )
    def test_a_refusal_is_quoted_with_the_key_to_change(self, scheduler, clients, made, said, key):
        clients.says("sbatch", ("", f"allocation failure:\n {said}\n", 1))
        with pytest.raises(SchedulerError) as caught:
            scheduler.require(made.run.plan)
        first, second = str(caught.value).splitlines()
        assert first == f"Slurm refuses this job: allocation failure: {said}"
        assert second.startswith(f"  the key to change: {key}")

    def test_a_refusal_that_nobody_knows_stands_alone(self, scheduler, clients, made):
        clients.says("sbatch", ("", "sbatch: the moon is full", 1))
        with pytest.raises(SchedulerError, match="^Slurm refuses this job: sbatch: the moon is full$"):
            scheduler.require(made.run.plan)

    def test_slurmctld_that_is_away_is_told_from_a_refusal(self, scheduler, clients, made):
        clients.says("sinfo", ("", "slurm_load_partitions: Unable to contact slurm controller (connect failure)", 1))
        with pytest.raises(SchedulerError, match="^Slurm does not answer: .*Unable to contact"):
            scheduler.require(made.run.plan)

    def test_neither_a_job_around_us_nor_the_users_defaults_change_what_is_asked(
        self, scheduler, clients, made, monkeypatch
    ):
        misleading = (
            "SLURM_JOB_ID SLURM_TIME_FORMAT SBATCH_PARTITION SINFO_FORMAT SQUEUE_STATES SACCT_FORMAT CPM_ATTEMPT"
        )
        for name in misleading.split():
            monkeypatch.setenv(name, "x")
        monkeypatch.setenv("SLURM_CONF", "/site/slurm.conf")
        scheduler.require(made.run.plan)
        scheduler.ended_as(made.run, SUBMISSION)
        for name in ("sbatch", "sinfo", "squeue", "sacct"):
            given = clients.environment(name)
            assert not given.keys() & set(misleading.split())
            assert (given["SLURM_CONF"], given["PATH"]) == ("/site/slurm.conf", str(clients.bin))


class TestExpectedStart:
    def told(
        self, scheduler, clients, made, start, rest=" using 64 processors on nodes g[2001-2002] in partition gpu1"
    ):
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(start))
        clients.says("sbatch", ("", f"sbatch: Job 58 to start at {moment}{rest}\n", 0))
        return scheduler.require(made.run.plan)

    def test_the_user_is_told_when_and_where(self, scheduler, clients, made):
        start = time.time() + 3 * 86_400
        when = time.strftime("%F %H:%M", time.localtime(start))
        expected = f"Slurm expects to start it at {when}, on g[2001-2002]"
        assert self.told(scheduler, clients, made, start) == expected

    def test_a_job_that_need_not_wait(self, scheduler, clients, made):
        assert (
            self.told(scheduler, clients, made, time.time() + 1) == "Slurm expects to start it at once, on g[2001-2002]"
        )

    def test_a_version_that_says_no_more_than_the_time(self, scheduler, clients, made):
        assert self.told(scheduler, clients, made, time.time(), rest="") == "Slurm expects to start it at once"

    @pytest.mark.parametrize("said", ["", "sbatch: Job 58 to start at (null) using 1 processors", "something else"])
    def test_no_time_is_no_sentence(self, scheduler, clients, made, said):
        clients.says("sbatch", ("", said, 0))
        assert scheduler.require(made.run.plan) == ""


class TestSubmission:
    @pytest.fixture
    def prepared(self, made_run):
        found = made_run(scheduler="slurm", batch=directives())
        return found.file("job.sbatch", batch_script(found.run.plan))

    def test_our_own_script_goes_in_and_its_job_is_recorded(self, scheduler, clients, prepared, monkeypatch):
        monkeypatch.setenv("SLURM_JOB_ID", "1")
        before = dict(os.environ)
        clients.says("sbatch", "Submitted batch job 4711\n")
        submission = scheduler.submit(prepared.run)
        assert (submission.job_id, submission.attempt) == ("4711", 1)
        assert read_submission(prepared.run) == submission
        submitted = prepared.run.files.root / "submitit" / "4711_submission.sh"
        assert submitted.read_text() == batch_script(prepared.run.plan)
        assert "SLURM_JOB_ID" not in clients.environment("sbatch")
        assert dict(os.environ) == before

    def test_a_refusal_is_quoted_and_nothing_is_recorded(self, scheduler, clients, prepared):
        clients.says("sbatch", ("", "sbatch: error: Batch job submission failed: Invalid account", 1))
        with pytest.raises(SchedulerError, match=r"sbatch refuses .*job\.sbatch: .*Invalid account"):
            scheduler.submit(prepared.run)
        assert read_submission(prepared.run) is None

    def test_a_job_lives_at_once_even_where_squeue_was_asked_just_before(
        self, scheduler, clients, prepared, monkeypatch
    ):
        """As cpm resume asks, whether the run goes on."""
        monkeypatch.setattr(slurm, "SECONDS_BETWEEN_QUESTIONS", 60.0)
        clients.says("squeue", queued(job("TIMEOUT")), queued(job("TIMEOUT"), job("PENDING", 8)))
        clients.says("sbatch", "Submitted batch job 8\n")
        assert not scheduler.is_alive(prepared.run, SUBMISSION)
        assert scheduler.is_alive(prepared.run, scheduler.submit(prepared.run))


class TestIsAlive:
    @pytest.mark.parametrize(
        "state",
        ["PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "COMPLETING", "CANCELLED COMPLETING", "PENDING REQUEUED"],
    )
    def test_whatever_slurm_waits_with_runs_or_cleans_up(self, scheduler, clients, made, state):
        clients.says("squeue", queued(job(state)))
        assert scheduler.is_alive(made.run, SUBMISSION)

    @pytest.mark.parametrize("state", ["COMPLETED", "FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE"])
    def test_what_has_ended_is_not(self, scheduler, clients, made, state):
        clients.says("squeue", queued(job(state)))
        assert not scheduler.is_alive(made.run, SUBMISSION)

    def test_nor_is_what_squeue_has_forgotten(self, scheduler, clients, made):
        clients.says("squeue", queued(job("RUNNING", 8)))
        assert not scheduler.is_alive(made.run, SUBMISSION)

    def test_one_answer_serves_all_runs_of_a_moment(self, scheduler, clients, made, monkeypatch):
        monkeypatch.setattr(slurm, "SECONDS_BETWEEN_QUESTIONS", 60.0)
        clients.says("squeue", queued(job("RUNNING")))
        look = scheduler.look()
        assert look(made.run, SUBMISSION) and not look(made.run, Submission("slurm", "8", "login-1"))
        assert len(clients.calls("squeue")) == 1

    def test_without_json_the_text_is_read(self, scheduler, clients, made):
        """squeue before 21.08 has no --json."""
        clients.says("squeue", ("", "squeue: unrecognized option '--json'", 1), "7\tRUNNING\tNone\tg2001\tN/A\n")
        assert scheduler.is_alive(made.run, SUBMISSION)


@pytest.mark.parametrize(
    "squeue",
    [
        (AWAY, "", 0),  # Slurm 22.05
        ("", "slurm_load_jobs error: Unable to contact slurm controller (connect failure)", 1),
        ('{"errors": [], "jobs": [{"job_', "", 0),
    ],
    ids=["errors in JSON", "connect failure", "torn"],
)
class TestWhileSlurmctldIsAway:
    """Jobs outlive it."""

    @pytest.fixture(autouse=True)
    def away(self, clients, squeue):
        clients.says("squeue", squeue)

    def test_a_run_that_has_not_ended_everywhere_lives(self, scheduler, made):
        assert scheduler.is_alive(made.phase("training").run, SUBMISSION)

    def test_a_run_that_has_ended_everywhere_does_not(self, scheduler, made):
        assert not scheduler.is_alive(made.phase("training").exited(0).run, SUBMISSION)

    def test_the_records_of_an_earlier_attempt_say_nothing_of_this_one(self, scheduler, made):
        made.exited(1).file("attempt-1/node-0/node.log", "").file("attempt-2/node-0/node.log", "")
        assert scheduler.is_alive(made.run, SUBMISSION)
        assert not scheduler.is_alive(made.exited(1, attempt=2).run, SUBMISSION)

    def test_a_run_that_stopped_before_its_time_limit_may_wait_to_go_on(self, scheduler, made):
        assert scheduler.is_alive(made.exited(EXIT_STOPPED).run, SUBMISSION)

    def test_a_run_whose_end_slurm_has_told_before_does_not(self, scheduler, made):
        record_job_end(made.phase("training").run, 1, JobEnd("7", "TIMEOUT", "sacct --jobs=7", "7|TIMEOUT"))
        assert not scheduler.is_alive(made.run, SUBMISSION)

    def test_nobody_waits_twice_for_an_answer_that_does_not_come(self, scheduler, clients, made, monkeypatch):
        monkeypatch.setattr(slurm, "SECONDS_BETWEEN_QUESTIONS", 60.0)
        scheduler.is_alive(made.run, SUBMISSION)
        asked = len(clients.calls("squeue"))
        scheduler.is_alive(made.run, SUBMISSION)
        assert len(clients.calls("squeue")) == asked

    def test_why_it_waits_is_why_nobody_knows(self, scheduler, made):
        assert scheduler.waiting_for(made.run, SUBMISSION)

    def test_how_it_ended_is_for_accounting_to_say(self, scheduler, clients, made):
        clients.says("sacct", accounted("TIMEOUT"))
        assert scheduler.ended_as(made.run, SUBMISSION).state == "TIMEOUT"


class TestARunOfAnotherUser:
    """A site may hide the jobs of others (PrivateData)."""

    @pytest.fixture(autouse=True)
    def another(self, made, monkeypatch):
        owner = made.run.files.root.stat().st_uid
        monkeypatch.setattr(slurm.os, "getuid", lambda: owner + 1)

    def test_slurm_is_asked_for_their_jobs(self, scheduler, clients, made):
        clients.says("squeue", queued(job("RUNNING")))
        assert scheduler.is_alive(made.run, SUBMISSION)
        assert f"--user={made.run.files.root.stat().st_uid}" in clients.calls("squeue")[0]

    def test_accounting_may_know_a_job_that_squeue_does_not_show(self, scheduler, clients, made):
        clients.says("sacct", accounted("RUNNING"), accounted("COMPLETED"))
        assert scheduler.is_alive(made.run, SUBMISSION)
        assert not scheduler.is_alive(made.run, SUBMISSION)

    def test_a_job_that_nobody_shows_is_not_taken_for_lost(self, scheduler, made):
        with pytest.raises(SchedulerError, match=f"belongs to {ME}, and Slurm shows you no job 7"):
            scheduler.is_alive(made.run, SUBMISSION)


class TestHowItEnded:
    def test_while_it_goes_on_there_is_nothing_to_say(self, scheduler, clients, made):
        clients.says("squeue", queued(job("PENDING REQUEUED")))
        clients.says("sacct", accounted("NODE_FAIL"))
        assert scheduler.ended_as(made.run, SUBMISSION) is None

    def test_squeue_alone_says_it_where_there_is_no_accounting(self, scheduler, clients, made):
        clients.remove("sacct")
        clients.says("squeue", queued(job("TIMEOUT", state_reason="TimeLimit")))
        end = scheduler.ended_as(made.run, SUBMISSION)
        assert (end.state, end.nodes, end.cancelled_by) == ("TIMEOUT", "g2001", "")
        assert (end.said_by, end.row) == ("squeue --jobs=7", "TIMEOUT (TimeLimit) g2001")

    def test_accounting_adds_who_cancelled_it(self, scheduler, clients, made):
        clients.says("squeue", queued(job("CANCELLED")))
        clients.says("sacct", accounted(f"CANCELLED by {os.getuid()}"))
        end = scheduler.ended_as(made.run, SUBMISSION)
        assert (end.state, end.cancelled_by, end.nodes) == ("CANCELLED", ME, "g[2001-2002]")
        assert end.said_by == "sacct --jobs=7" and end.row.startswith(f"7|CANCELLED by {os.getuid()}|0:0|")

    def test_a_user_without_a_name_is_a_number(self, scheduler, clients, made):
        clients.says("sacct", accounted("CANCELLED by 4294000000"))
        assert scheduler.ended_as(made.run, SUBMISSION).cancelled_by == "user 4294000000"

    def test_accounting_alone_knows_what_squeue_has_forgotten(self, scheduler, clients, made):
        clients.says("sacct", accounted("NODE_FAIL"))
        assert scheduler.ended_as(made.run, SUBMISSION).state == "NODE_FAIL"

    def test_a_step_tells_that_the_memory_was_too_small(self, scheduler, clients, made):
        clients.says("sacct", accounted("FAILED", code="3:0") + accounted("OUT_OF_MEMORY", "7.0", code="0:125"))
        end = scheduler.ended_as(made.run, SUBMISSION)
        assert end.state == "OUT_OF_MEMORY" and end.row.endswith("; step 0 OUT_OF_MEMORY 0:125")

    def test_the_newest_incarnation_counts(self, scheduler, clients, made):
        requeued = accounted("PREEMPTED", submitted="2026-01-02T03:04:05")
        clients.says("sacct", requeued + accounted("TIMEOUT", submitted="2026-01-02T09:00:00"))
        assert scheduler.ended_as(made.run, SUBMISSION).state == "TIMEOUT"

    @pytest.mark.parametrize("late", ["RUNNING", "REQUEUED", "PREEMPTED"])
    def test_accounting_that_is_late_is_passed_over(self, scheduler, clients, made, late):
        clients.says("squeue", queued(job("OUT_OF_MEMORY")))
        clients.says("sacct", accounted(late))
        assert scheduler.ended_as(made.run, SUBMISSION).said_by == "squeue --jobs=7"

    @pytest.mark.parametrize("sacct", ["", ("", "Slurm accounting storage is disabled", 1), accounted("RUNNING")])
    def test_what_nobody_knows_is_not_known(self, scheduler, clients, made, sacct):
        clients.says("sacct", sacct)
        assert scheduler.ended_as(made.run, SUBMISSION) is None


class TestWaiting:
    def test_a_waiting_job_says_why_and_until_when(self, scheduler, clients, made):
        start = 1_800_000_000
        clients.says("squeue", queued(job("PENDING", state_reason="Priority", start_time=start)))
        when = time.strftime("%F %H:%M", time.localtime(start))
        assert scheduler.waiting_for(made.run, SUBMISSION) == f"waiting (Priority), start expected {when}"

    def test_one_that_is_requeued_waits_too(self, scheduler, clients, made):
        clients.says("squeue", queued(job("PENDING REQUEUED", state_reason="BeginTime")))
        assert scheduler.waiting_for(made.run, SUBMISSION) == "waiting (BeginTime)"

    def test_one_that_slurm_has_not_looked_at_has_no_reason_yet(self, scheduler, clients, made):
        clients.says("squeue", queued(job("PENDING", state_reason="None")))
        assert scheduler.waiting_for(made.run, SUBMISSION) == "waiting"

    @pytest.mark.parametrize("jobs", [[job("RUNNING")], []])
    def test_any_other_does_not(self, scheduler, clients, made, jobs):
        clients.says("squeue", queued(*jobs))
        assert scheduler.waiting_for(made.run, SUBMISSION) == ""


class TestEnding:
    def test_a_warning_goes_to_the_steps_and_not_to_the_script(self, scheduler, clients, made):
        """`--batch` would signal the script, and a signal without a step's number spares it (man scancel)."""
        scheduler.warn(made.run, SUBMISSION)
        assert clients.calls("scancel") == [["--signal=USR2", "7"]]

    def test_cancel_returns_when_slurm_has_let_go(self, scheduler, clients, made):
        answers = [queued(job("RUNNING")), queued(job("CANCELLED COMPLETING")), queued(job("CANCELLED"))]
        clients.says("squeue", *answers, queued(job("RUNNING")))
        scheduler.cancel(made.run, SUBMISSION)
        assert clients.calls("scancel") == [["7"]]
        assert len(clients.calls("squeue")) == len(answers)

    def test_cancel_says_when_slurm_does_not(self, scheduler, clients, made, monkeypatch):
        monkeypatch.setattr(slurm, "PATIENCE_OF_CANCEL_S", 0.05)
        clients.says("squeue", queued(job("COMPLETING")))
        with pytest.raises(SchedulerError, match="Slurm still holds job 7; squeue --job 7"):
            scheduler.cancel(made.run, SUBMISSION)

    def test_a_job_that_has_gone_already_need_not_be_cancelled(self, scheduler, clients, made):
        clients.says("scancel", ("", "scancel: error: Kill job error on job id 7: Invalid job id specified", 1))
        scheduler.cancel(made.run, SUBMISSION)
        assert clients.calls("scancel") == [["7"]]

    def test_a_job_that_cannot_be_cancelled_goes_on(self, scheduler, clients, made):
        clients.says("squeue", queued(job("RUNNING")))
        clients.says("scancel", ("", "scancel: error: Kill job error on job id 7: Access/permission denied", 1))
        with pytest.raises(SchedulerError, match="^scancel 7: .*permission denied"):
            scheduler.cancel(made.run, SUBMISSION)

    def test_nothing_is_cancelled_while_slurmctld_is_away(self, scheduler, clients, made):
        clients.says("squeue", AWAY)
        clients.says("scancel", ("", "scancel: error: Unable to contact slurm controller (connect failure)", 8))
        with pytest.raises(SchedulerError, match="Unable to contact slurm controller"):
            scheduler.cancel(made.phase("training").run, SUBMISSION)
