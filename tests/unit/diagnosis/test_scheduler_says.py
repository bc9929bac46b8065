"""What Slurm's word makes of a verdict that leaves open what ended the run."""

from __future__ import annotations

import pytest

from cpm_cluster.diagnosis.retry import BUDGETS
from cpm_cluster.diagnosis.scheduler_says import SAYINGS, as_the_scheduler_says, leaves_open
from cpm_cluster.diagnosis.verdict import Evidence, Verdict
from cpm_cluster.runs.job_end import JobEnd

LOG = Evidence("slurm-7.log", 4, "*** JOB 7 ***")
LOST = Verdict("lost", "Its node agent ended without recording how.", True, "cpm resume x", (LOG,))
TERMINATED = Verdict("terminated", "It was told to end.", True, "cpm resume x")
KILLED = Verdict("killed", "Rank 3 was killed (SIGKILL) by somebody, or by the kernel.", True, "dmesg", rank=3)


def end(state, **more):
    return JobEnd("7", state, "sacct --jobs=7", f"7|{state}|0:0", **more)


@pytest.mark.parametrize("verdict", [LOST, TERMINATED], ids=lambda verdict: verdict.category)
@pytest.mark.parametrize(
    ("state", "category", "transient", "cause"),
    [
        ("TIMEOUT", "time limit", True, "Slurm ended it at its time limit."),
        ("DEADLINE", "time limit", True, "Slurm ended it because it could not be done before its deadline."),
        ("NODE_FAIL", "node", True, "Slurm ended it because a node failed (on g[2001-2002])."),
        ("BOOT_FAIL", "node", True, "Slurm ended it because a node failed (on g[2001-2002])."),
        ("PREEMPTED", "preempted", True, "Slurm preempted it for another job."),
        ("CANCELLED", "cancelled", False, "It was cancelled in Slurm by root, not by cpm cancel."),
        ("OUT_OF_MEMORY", "out of memory", False, "It was killed for lack of host memory (on g[2001-2002])."),
    ],
)
def test_slurm_knows_what_the_records_leave_open(verdict, state, category, transient, cause):
    found = as_the_scheduler_says(verdict, end(state, nodes="g[2001-2002]", cancelled_by="root"))
    assert (found.category, found.transient, found.cause) == (category, transient, cause)
    assert found.evidence == (Evidence("sacct --jobs=7", 0, f"7|{state}|0:0"), *verdict.evidence)
    assert found.transient == (category in BUDGETS)


def test_all_of_it_is_printed(capsys):
    print(as_the_scheduler_says(LOST, end("TIMEOUT")))
    assert capsys.readouterr().out.splitlines() == [
        "Slurm ended it at its time limit.",
        "  what to do: lengthen signal_lead or time_limit, or: cpm resume x",
        "  sacct --jobs=7: 7|TIMEOUT|0:0",
        "  slurm-7.log:4: *** JOB 7 ***",
    ]


@pytest.mark.parametrize("state", SAYINGS)
def test_what_is_not_known_leaves_no_gap(state):
    cause = as_the_scheduler_says(LOST, end(state)).cause
    assert "{" not in cause and "  " not in cause and " ." not in cause and "()" not in cause


def test_too_little_memory_is_no_reason_to_start_the_same_job_again():
    assert as_the_scheduler_says(LOST, end("OUT_OF_MEMORY")).remedy == "ask for more resources.memory_per_node"


@pytest.mark.parametrize("state", ["FAILED", "COMPLETED", "A_STATE_OF_TOMORROW"])
def test_a_word_that_explains_nothing_is_evidence_all_the_same(state):
    found = as_the_scheduler_says(LOST, end(state))
    assert (found.category, found.cause, found.remedy) == (LOST.category, LOST.cause, LOST.remedy)
    assert [item.file for item in found.evidence] == ["sacct --jobs=7", "slurm-7.log"]


def test_a_killed_rank_was_killed_by_the_kernel_where_slurm_saw_that():
    found = as_the_scheduler_says(KILLED, end("OUT_OF_MEMORY"))
    assert (found.category, found.rank, found.transient) == ("out of memory", 3, False)


@pytest.mark.parametrize("state", ["FAILED", "CANCELLED", "TIMEOUT"])
def test_and_otherwise_it_stays_what_it_is(state):
    assert as_the_scheduler_says(KILLED, end(state)) == KILLED


def test_a_hostile_row_cannot_drive_the_terminal():
    hostile = JobEnd("7", "FAILED", "sacct --jobs=7", "7|\x1b[2J" + "x" * 5000)
    (evidence, _) = as_the_scheduler_says(LOST, hostile).evidence
    assert evidence.text.isprintable() and len(evidence.text) <= 1000


@pytest.mark.parametrize(
    "category", ["program", "user error", "diverged", "crashed", "node", "time limit", "cancelled"]
)
def test_a_verdict_that_is_certain_asks_nobody(category):
    assert not leaves_open(Verdict(category, "It broke.", False, "mend it"))
