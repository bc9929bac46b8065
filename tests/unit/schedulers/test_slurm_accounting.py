"""What accounting says: incarnations and steps, Slurm's words without what follows them, and no error in any case."""

from __future__ import annotations

import os
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from slurm_clients import SlurmClients, accounted

from cpm_cluster.schedulers import slurm_accounting
from cpm_cluster.schedulers.slurm_accounting import FIELDS, accounted_jobs, parse_sacct
from cpm_cluster.schedulers.slurm_queue import ENDED

# As Slurm 22.05 writes it: a job that asked to be requeued with code 85, and finished then.
REQUEUED = """\
6|REQUEUED|0:0|85:0|g2001|2026-11-25T12:50:01|2026-11-25T12:51:04|2026-11-25T12:50:01|None
6.batch|FAILED|85:0||g2001|2026-11-25T12:50:01|2026-11-25T12:51:04|2026-11-25T12:50:01|
6.0|FAILED|85:0||g2001|2026-11-25T12:50:01|2026-11-25T12:51:04|2026-11-25T12:50:01|
7|COMPLETED|0:0|0:0|g[2001-2008]|2026-11-25T12:53:38|2026-11-25T12:53:38|2026-11-25T12:52:58|None
6|COMPLETED|0:0|85:0|g2001|2026-11-25T12:51:29|2026-11-25T12:53:37|2026-11-25T12:51:04|BeginTime
6.batch|COMPLETED|0:0||g2001|2026-11-25T12:51:29|2026-11-25T12:53:37|2026-11-25T12:51:29|
"""
STATES = [*sorted(ENDED), "RUNNING", "PENDING", "REQUEUED", "RESIZING", "A_STATE_OF_TOMORROW"]


@pytest.fixture
def clients(tmp_path, monkeypatch):
    stand_ins = SlurmClients(tmp_path / "clients")
    monkeypatch.setenv("PATH", str(stand_ins.bin))
    return stand_ins


def only(text):
    ((job,),) = parse_sacct(text).values()
    return job


def test_every_incarnation_has_its_own_steps_and_the_newest_is_the_last():
    jobs = parse_sacct(REQUEUED)
    assert list(jobs) == ["6", "7"]
    first, newest = jobs["6"]
    assert (first.state, first.has_ended, [step.step for step in first.steps]) == ("REQUEUED", False, ["batch", "0"])
    assert (newest.state, newest.has_ended, [step.step for step in newest.steps]) == ("COMPLETED", True, ["batch"])
    assert (newest.start, newest.end, newest.reason) == ("2026-11-25T12:51:29", "2026-11-25T12:53:37", "BeginTime")
    assert (newest.derived_exit_code, first.steps[1].exit_code, newest.row) == (85, 85, REQUEUED.splitlines()[4])


@pytest.mark.parametrize("wording", ["{}", "{}+", "{} by 1001", "{} by 1001+"])
@pytest.mark.parametrize("state", STATES)
def test_a_state_is_slurms_word_alone_and_an_unknown_one_stays(state, wording):
    job = only(accounted(wording.format(state)))
    assert job.state == state
    assert job.cancelled_by == (1001 if "by" in wording else None)
    assert job.has_ended == (state in ENDED)


def test_a_signal_is_no_exit_code():
    job = only(accounted("CANCELLED by 0", code="0:15"))
    assert (job.exit_code, job.signal, job.cancelled_by) == (0, 15, 0)


def test_what_slurm_does_not_know_is_not_made_up():
    job = only("17|PENDING|||None assigned|Unknown|Unknown|2026-11-25T12:56:41|JobHeldUser\n")
    assert (job.exit_code, job.signal, job.derived_exit_code) == (None, None, None)
    assert (job.nodes, job.start, job.end, job.reason) == ("", "", "", "JobHeldUser")


@pytest.mark.parametrize(("state", "word"), [("FAILED", "OUT_OF_MEMORY"), ("CANCELLED by 7", "CANCELLED")])
def test_a_job_that_failed_for_lack_of_memory_says_so_only_in_a_step(state, word):
    text = accounted(state) + accounted("COMPLETED", "7.batch") + accounted("OUT_OF_MEMORY", "7.0", code="0:125")
    assert only(text).word == word


def test_a_reason_may_hold_the_separator():
    assert only(accounted("FAILED").strip() + "|of|all").reason == "None|of|all"


@pytest.mark.parametrize(
    "noise", ["", "\n\n", "a warning\n", "7|COMPLETED\n", accounted("FAILED", "7.0"), "|" * 8 + "\n"]
)
def test_lines_in_another_form_are_passed_over(noise):
    assert parse_sacct(noise) == {}
    assert only(noise + accounted("COMPLETED")).state == "COMPLETED"


@given(st.text())
def test_no_text_is_an_error(text):
    parse_sacct(text)


@given(st.lists(st.lists(st.text(), min_size=len(FIELDS), max_size=len(FIELDS)).map("|".join)).map("\n".join))
def test_nor_are_rows_of_any_content(text):
    for incarnations in parse_sacct(text).values():
        assert incarnations


WORDS = st.text("ABCDEFGHIJKLMNOPQRSTUVWXYZ_", min_size=1)
STEPS = st.sampled_from(["batch", "extern", "interactive", "0", "1", "12"])


@given(
    st.lists(
        st.tuples(st.integers(1, 3), WORDS, st.integers(0, 255), st.integers(0, 64), st.lists(st.tuples(STEPS, WORDS))),
        max_size=6,
    )
)
def test_whatever_is_written_is_read(incarnations):
    """Incarnations of three jobs in any order of jobs, in the order of their submission."""
    text, expected = "", {}
    for number, (job_id, state, code, signal, steps) in enumerate(incarnations):
        text += accounted(state, str(job_id), f"2026-01-02T03:04:{number:02}", f"{code}:{signal}")
        text += "".join(accounted(word, f"{job_id}.{step}") for step, word in steps)
        expected.setdefault(str(job_id), []).append((state, code, signal, steps))
    found = {
        job_id: [(j.state, j.exit_code, j.signal, [(s.step, s.state) for s in j.steps]) for j in jobs]
        for job_id, jobs in parse_sacct(text).items()
    }
    assert found == expected


def test_one_call_serves_any_number_of_runs(clients):
    clients.says("sacct", REQUEUED)
    assert set(accounted_jobs(["7", "6", "9"], 1001)) == {"6", "7"}
    (call,) = clients.calls("sacct")
    assert {"--jobs=6,7,9", "--uid=1001", "--duplicates", "--parsable2", "--noheader"} <= set(call)
    assert f"--format={','.join(FIELDS)}" in call


def test_about_no_run_nobody_is_asked(clients):
    assert accounted_jobs([], 1001) == {}
    assert clients.calls("sacct") == []


@pytest.mark.parametrize(
    "answer",
    [
        ("", "Slurm accounting storage is disabled", 1),
        ("", "sacct: error: Problem talking to the database: Connection refused", 1),
        ("", "sacct: error: DBD_GET_JOBS_COND failure: Unspecified error", 0),  # 22.05 says 0
        (accounted("COMPLETED"), "sacct: error: and then it broke", 1),
    ],
)
def test_accounting_that_fails_knows_nothing(clients, answer):
    clients.says("sacct", answer)
    assert accounted_jobs(["7"], 1001) == {}


def test_a_site_without_sacct_knows_nothing(clients):
    clients.remove("sacct")
    assert accounted_jobs(["7"], 1001) == {}


def test_nobody_waits_long_for_a_slurmdbd_that_does_not_answer(clients, monkeypatch):
    monkeypatch.setattr(slurm_accounting, "PATIENCE_S", 0.2)
    (clients.bin / "sacct").write_text("#!/bin/sh\nexec /bin/sleep 30\n")
    began = time.monotonic()
    assert accounted_jobs(["7"], os.getuid()) == {}
    assert time.monotonic() - began < 5
