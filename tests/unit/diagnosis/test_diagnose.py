"""From the records of a run to why it ended, and what to do: one test a rule, and which comes first."""

from __future__ import annotations

import os

import pytest

from cpm_cluster.diagnosis.diagnose import diagnose
from cpm_cluster.diagnosis.verdict import Evidence, Verdict
from cpm_cluster.runs.state import read_state

# torch 2.13's own words, of a run whose rank 1 was killed
KILLED = """\
E1125 10:03:19.140 failed (exitcode: -9) local_rank: 1 (pid: 23980) of binary: python
============================================================
trainer FAILED
------------------------------------------------------------
Failures:
[1]:
  time      : 2026-11-25_10:03:19
  host      : localhost
  rank      : {second[0]} (local_rank: {second[0]})
  exitcode  : {second[1]} (pid: 23980)
  error_file: <N/A>
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-11-25_10:03:19
  host      : localhost
  rank      : {first[0]} (local_rank: {first[0]})
  exitcode  : {first[1]} (pid: 23978)
  error_file: <N/A>
"""


def verdict_of(made):
    return diagnose(made.run, read_state(made.run, alive=False))


@pytest.fixture
def ended(made_run):
    """A run of the trainer that has begun and is gone."""
    return made_run().submitted().phase("training")


@pytest.fixture
def program(made_run):
    """The same of any other program."""
    return made_run(trainer=False).submitted().phase("training")


def test_what_goes_on_or_has_finished_has_no_verdict(ended, made_run):
    assert diagnose(ended.run, read_state(ended.run, alive=True)) is None
    assert verdict_of(ended.exited(0)) is None
    assert verdict_of(made_run("b-20260102-030405-0001")) is None  # prepared


def test_every_verdict_says_what_to_do(ended):
    verdict = verdict_of(ended.cancelled().exited(143, stopped_by="SIGTERM"))
    assert (verdict.category, verdict.transient) == ("cancelled", False)
    assert verdict.remedy == f"cpm resume {ended.run.id} (from the beginning: there is no checkpoint)"


def test_a_resume_starts_from_the_newest_checkpoint_that_lies_there(ended):
    """Whatever the progress says: it may be that of an attempt that never got so far."""
    ended.file("progress.json", {"checkpoint_step": 3}).file("checkpoints/latest", "step-00000120\n")
    assert "(from the checkpoint of step 120)" in verdict_of(ended).remedy


def test_another_program_is_just_started_again(program):
    assert verdict_of(program.cancelled()).remedy == f"cpm resume {program.run.id} (starts its program again)"


def test_a_run_that_stopped_before_its_time_limit(ended):
    verdict = verdict_of(ended.file("checkpoints/latest", "step-40\n").exited(85, stopped_by="SIGUSR2"))
    assert (verdict.category, verdict.transient) == ("time limit", True)
    assert verdict.cause == "It saved and stopped before its time limit."


def test_a_run_that_stopped_while_it_was_loading(ended):
    verdict = verdict_of(ended.exited(85, stopped_by="SIGUSR2"))
    assert verdict.cause == "It stopped before its time limit, with nothing to save yet."


def test_a_generation_that_stopped_keeps_its_answers(ended):
    verdict = verdict_of(ended.file("generated/rank-0.jsonl", '{"number": 0}\n').exited(85, stopped_by="SIGUSR2"))
    assert verdict.cause == "It saved and stopped before its time limit."
    assert verdict.remedy == f"cpm resume {ended.run.id} (the answers that it has stay)"


def test_a_lost_run(ended):
    verdict = verdict_of(ended)
    assert (verdict.category, verdict.transient) == ("lost", True)
    assert "ended without recording how" in verdict.cause and verdict.evidence == ()


def test_the_last_words_of_a_lost_run_are_those_of_its_newest_agent_or_guard(ended):
    ended.file("submitit/5_0_log.out", "old\n")
    os.utime(ended.run.files.root / "submitit/5_0_log.out", (1, 1))
    ended.file("submitit/7_0_log.out", "submitit INFO (now) - Loading\ncpm: the node agent was killed by signal 9\n")
    expected = Evidence("submitit/7_0_log.out", 2, "cpm: the node agent was killed by signal 9")
    assert verdict_of(ended).evidence == (expected,)
    ended.file("submitit/7_0_log.out", "submitit INFO (now) - Loading\n")
    assert verdict_of(ended).evidence == ()


def test_a_rank_that_failed(ended):
    verdict = verdict_of(ended.rank_error(3, time=1).exited(1))
    assert (verdict.category, verdict.rank, verdict.transient) == ("program", 3, False)
    assert verdict.cause == "Rank 3 failed first, with RuntimeError: of rank 3."
    assert verdict.remedy == f"see cpm logs {ended.run.id} --rank 3"
    assert verdict.evidence == (Evidence("errors/rank-3.json", 0, "RuntimeError, raised at /x/y.py:7"),)


def test_the_rank_that_failed_first_counts_and_not_the_loudest(ended):
    """The others only notice that it has gone."""
    ended.rank_error(0, time=20.5, message="Connection closed by peer").rank_error(7, time=20.1, type_="ValueError")
    ended.rank_error(12, time=21).exited(1)
    assert (verdict_of(ended).rank, verdict_of(ended).cause) == (7, "Rank 7 failed first, with ValueError: of rank 7.")


def test_what_the_user_can_correct_is_one_sentence(ended):
    message = 'the data have 1 problem(s): /d/rows.jsonl:7: has no "output"'
    verdict = verdict_of(ended.rank_error(1, time=1, type_="UserError", user_error=True, message=message).exited(2))
    assert (verdict.category, verdict.transient, verdict.evidence) == ("user error", False, ())
    assert verdict.cause == f"The trainer refused: {message}."
    assert "correct the data" in verdict.remedy and "submitted anew" in verdict.remedy


def test_a_training_that_diverged(ended):
    verdict = verdict_of(
        ended.rank_error(0, time=1, type_="FloatingPointError", message="loss is nan at step 5").exited(1)
    )
    assert verdict.category == "diverged" and verdict.cause == "The training diverged: loss is nan at step 5."
    assert "lower training.lr" in verdict.remedy


@pytest.mark.parametrize("order", [((1, -9), (0, 1)), ((0, 1), (1, -9))])
def test_a_rank_that_was_killed_cannot_say_so_and_the_others_only_follow(ended, order):
    log = KILLED.format(first=order[0], second=order[1])
    ended.file("attempt-1/node-0/node.log", log).rank_error(0, time=1, message="Connection closed by peer")
    verdict = verdict_of(ended.exited(1))
    assert (verdict.category, verdict.rank, verdict.transient) == ("killed", 1, True)
    assert "SIGKILL" in verdict.cause and "host memory" in verdict.cause
    (evidence,) = verdict.evidence
    assert evidence.file == "attempt-1/node-0/node.log" and "-9" in log.splitlines()[evidence.line - 1]


def test_a_rank_that_crashed_in_native_code(ended):
    ended.file("attempt-1/node-0/node.log", KILLED.format(first=(1, -11), second=(0, -6)))
    verdict = verdict_of(ended.exited(1))
    assert (verdict.category, verdict.rank, verdict.transient) == ("crashed", 1, False)
    assert "SIGSEGV" in verdict.cause and "--rank 1" in verdict.remedy


def test_an_abort_follows_from_an_error_that_was_recorded(ended):
    ended.file("attempt-1/node-0/node.log", KILLED.format(first=(1, -6), second=(0, 1))).rank_error(0, time=1)
    assert verdict_of(ended.exited(1)).rank == 0


def test_logs_of_earlier_attempts_are_not_evidence(ended):
    ended.file("attempt-1/node-0/node.log", KILLED.format(first=(1, -9), second=(0, 1))).exited(1)
    ended.phase("training", attempt=2).exited(7, attempt=2)
    assert verdict_of(ended).category == "program"


def test_ranks_that_the_agent_killed_are_not_the_cause(ended):
    ended.file("attempt-1/node-0/node.log", KILLED.format(first=(1, -9), second=(0, -9)))
    assert verdict_of(ended.exited(137, stopped_by="SIGTERM", killed=True)).category == "terminated"


def test_a_node_that_could_not_run_it(ended):
    ended.event("error", attempt=1, node="g2003", message="8 GPUs expected\nand more").exited(3, node="g2003")
    verdict = verdict_of(ended)
    assert (verdict.category, verdict.node) == ("node", "g2003")
    assert verdict.cause == "Node g2003 could not run it: 8 GPUs expected."
    assert verdict.evidence[0].file == "events/g2003.jsonl"


def test_errors_of_a_node_in_an_earlier_attempt_are_over(ended):
    ended.event("error", attempt=1, message="x").exited(3).phase("training", attempt=2).exited(1, attempt=2)
    assert verdict_of(ended).category == "program"


def test_a_run_that_did_not_stop_before_its_time_limit(ended):
    verdict = verdict_of(ended.exited(137, stopped_by="SIGUSR2", killed=True))
    assert (verdict.category, verdict.transient) == ("time limit", True)
    assert "did not end in time and was killed" in verdict.cause and "lengthen signal_lead" in verdict.remedy


def test_a_run_that_something_else_told_to_end(ended):
    ended.file("checkpoints/latest", "step-00000007\n")
    verdict = verdict_of(ended.exited(143, stopped_by="SIGTERM"))
    assert (verdict.category, verdict.transient) == ("terminated", True)
    assert "told to end (SIGTERM) by something else than cpm cancel, and ended with code 143" in verdict.cause
    assert "step 7" in verdict.remedy


def test_an_error_while_it_was_told_to_end_is_what_happened(ended):
    """The disk was full when it saved."""
    ended.rank_error(0, time=1, type_="OSError", message="No space left on device").exited(1, stopped_by="SIGUSR2")
    assert "No space left" in verdict_of(ended).cause


@pytest.mark.parametrize(
    ("code", "category", "words"),
    [
        (7, "program", "The program ended with code 7."),
        (143, "program", "The program ended with code 143 (SIGTERM)."),
        (255, "program", "The program ended with code 255."),
        (137, "killed", "The program was killed (SIGKILL) by somebody, or by the kernel for lack of host memory."),
        (139, "crashed", "The program was ended by a crash of native code (SIGSEGV)."),
    ],
)
def test_where_nothing_else_is_known_the_exit_code_speaks(program, code, category, words):
    verdict = verdict_of(program.exited(code))
    assert (verdict.category, verdict.cause) == (category, words)


def test_the_launcher_of_the_ranks_that_was_killed_has_its_name(ended):
    assert "The launcher (torchrun) was killed" in verdict_of(ended.exited(137)).cause


def test_the_last_words_of_the_program_are_the_evidence(program):
    log = "one\nloading 10%\r 50%\r100% done\x1b[31m\n\n \n"
    program.file("attempt-1/node-0/node.log", log).exited(1)
    (evidence,) = verdict_of(program).evidence
    assert (evidence.file, evidence.line) == ("attempt-1/node-0/node.log", 2)
    assert evidence.text == "100% done\\x1b[31m"  # the last state of a progress bar, nothing that drives a terminal


def test_a_log_of_any_length_is_read_at_its_end(program):
    program.file("attempt-1/node-0/node.log", "noise\n" * 500_000 + "the end").exited(1)
    assert verdict_of(program).evidence == (Evidence("attempt-1/node-0/node.log", 0, "the end"),)


def test_a_message_of_any_length_is_one_line(ended):
    verdict = verdict_of(ended.rank_error(0, time=1, message="x" * 9999 + "\nmore").exited(1))
    assert len(verdict.cause) < 1200 and "\n" not in verdict.cause


def test_records_that_are_torn_are_passed_over(ended):
    ended.file("errors/rank-0.json", '{"rank": 0, "mess').file("errors/rank-1.json", "[]").exited(1)
    assert verdict_of(ended).category == "program"


def test_a_verdict_as_people_read_it():
    verdict = Verdict("x", "It broke.", False, "mend it", (Evidence("a.log", 3, "oh"), Evidence("b.json", 0, "no")))
    assert str(verdict) == "It broke.\n  what to do: mend it\n  a.log:3: oh\n  b.json: no"


def test_who_knows_the_node_at_fault_is_believed_before_those_who_miss_it(ended):
    ended.event("error", "g2002", attempt=1, message="node 0 cannot be reached", blamed=[]).exited(3, node="g2002")
    ended.event("error", "g2001", attempt=1, message="g2003 did not come", blamed=["g2003"]).exited(3, node="g2001")
    verdict = verdict_of(ended)
    assert (verdict.node, verdict.transient) == ("g2003", True)
    assert "g2003 did not come" in verdict.cause


def test_what_fails_on_any_node_is_not_tried_again(ended):
    verdict = verdict_of(ended.event("error", attempt=1, message="no such image", blamed=[]).exited(3))
    assert (verdict.category, verdict.transient) == ("node", False)


SLURMSTEPD = "slurmstepd: error: *** STEP 7.0 ON g2001 CANCELLED AT 2026-01-02T03:04:05 DUE TO {} ***\n"


def slurm_log(made, *lines, attempt=1):
    return made.file("slurm-7.log", f"cpm: attempt {attempt} begins\n" + "".join(lines))


def test_slurm_preempted_it(ended):
    slurm_log(ended, SLURMSTEPD.format("PREEMPTION")).exited(143, stopped_by="SIGTERM")
    verdict = verdict_of(ended)
    assert (verdict.category, verdict.transient) == ("preempted", True)
    assert (verdict.evidence[0].file, verdict.evidence[0].line) == ("slurm-7.log", 2)


@pytest.mark.parametrize(
    ("said", "node"),
    [("srun: error: Node failure on g2003\n", "g2003"), ("", "g2002")],
    ids=["srun names it", "it began and never said how it ended"],
)
def test_a_node_failed(ended, said, node):
    slurm_log(ended, said, SLURMSTEPD.format("NODE FAILURE, SEE SLURMCTLD LOG FOR DETAILS"))
    ended.phase("prepare", node="g2001").phase("prepare", node="g2002").exited(143, node="g2001")
    verdict = verdict_of(ended)
    assert (verdict.category, verdict.node, verdict.transient) == ("node", node, True)
    assert verdict.cause == f"Node {node} failed."


def test_that_srun_ended_the_others_is_not_the_cause(ended):
    slurm_log(ended, SLURMSTEPD.format("TASK FAILURE")).rank_error(1, time=1.0).exited(1)
    assert verdict_of(ended).category == "program"


def test_what_slurm_said_of_another_attempt_does_not_count(ended):
    log = "cpm: attempt 1 begins\n" + SLURMSTEPD.format("PREEMPTION") + "cpm: attempt 2 begins\n"
    ended.file("slurm-7.log", log).exited(143, stopped_by="SIGTERM")
    assert verdict_of(ended).category == "preempted"
    ended.phase("training", attempt=2).exited(1, attempt=2)
    assert verdict_of(ended).category == "program"


def test_the_kernel_killed_the_container(ended):
    ended.event("container", attempt=1, id="abc", state={"OOMKilled": True}).exited(137)
    verdict = verdict_of(ended)
    assert (verdict.category, verdict.transient) == ("out of memory", False)
    assert "memory_per_node" in verdict.remedy


def test_the_kernel_killed_something_in_the_step(ended):
    slurm_log(ended, "slurmstepd: error: Detected 1 oom-kill event(s) in StepId=7.0. Some of your processes…\n")
    ended.file("attempt-1/node-0/node.log", KILLED.format(first=(0, -9), second=(1, -15))).exited(1)
    verdict = verdict_of(ended)
    assert (verdict.category, verdict.rank) == ("out of memory", 0)


def test_a_full_gpu(ended):
    verdict = verdict_of(ended.rank_error(3, 1.0, "OutOfMemoryError", message="CUDA out of memory. Tried…").exited(1))
    assert (verdict.category, verdict.transient, verdict.rank) == ("out of memory", False, 3)
    assert "micro_batch" in verdict.remedy


@pytest.mark.parametrize(
    ("type_", "message"),
    [
        ("DistBackendError", "NCCL error in: ProcessGroupNCCL.cpp:1234, unhandled system error"),
        ("RuntimeError", "[../third_party/gloo/gloo/transport/tcp/pair.cc:598] Connection closed by peer [10.77.0.2]"),
        ("RuntimeError", "Timed out waiting 1800000ms for recv operation to complete"),
    ],
)
def test_ranks_that_lost_each_other(ended, type_, message):
    verdict = verdict_of(ended.rank_error(0, 1.0, type_, message=message).exited(1))
    assert (verdict.category, verdict.transient) == ("fabric", True)


def test_the_agent_was_killed_whatever_the_ranks_say_of_it(ended):
    ended.event("agent_killed", "g2001", attempt=1, signal="SIGKILL").exited(137, node="g2001")
    verdict = verdict_of(ended.rank_error(9, 1.0, message="Connection closed by peer"))
    assert (verdict.category, verdict.transient) == ("killed", True)
    assert verdict.cause == "The node agent on g2001 was killed (SIGKILL)."
