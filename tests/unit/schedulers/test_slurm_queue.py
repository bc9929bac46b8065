"""What Slurm says of jobs, in the forms that its versions have."""

from __future__ import annotations

import json

import pytest

from cpm_cluster.schedulers import SchedulerError
from cpm_cluster.schedulers.slurm_queue import (
    TEXT_FORMAT,
    _node_group,
    parse_squeue_json,
    parse_squeue_text,
)


def job(**changes):
    raw = {"job_id": 7, "job_state": "RUNNING", "state_reason": "None", "nodes": "g[2001-2002]", "start_time": 1000}
    found = parse_squeue_json(json.dumps({"jobs": [{**raw, **changes}]}))
    return found["7"]


@pytest.mark.parametrize("state", ["RUNNING", ["RUNNING"]])
def test_a_state_is_a_text_or_a_list(state):
    assert job(job_state=state).states == {"RUNNING"}
    assert job(job_state=state).is_alive


@pytest.mark.parametrize("start", [1000, {"set": True, "infinite": False, "number": 1000}])
def test_a_time_is_a_number_or_an_object(start):
    assert job(start_time=start).start == "1000"
    assert job(start_time={"set": False, "infinite": False, "number": 0}).start == ""


@pytest.mark.parametrize("state", ["COMPLETED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"])
def test_a_job_that_has_ended_is_not_alive(state):
    assert not job(job_state=[state]).is_alive


def test_a_job_that_is_still_cleaning_up_is_alive():
    assert job(job_state=["CANCELLED", "COMPLETING"]).is_alive


@pytest.mark.parametrize(
    ("states", "word"),
    [(["TIMEOUT"], "TIMEOUT"), ("CANCELLED", "CANCELLED"), ("CANCELLED COMPLETING", ""), (["RUNNING"], "")],
)
def test_the_word_for_how_a_job_ended(states, word):
    assert job(job_state=states).ended_as == word


def test_an_answer_that_tells_errors_is_no_list_of_jobs():
    """Slurm 22.05 answers like this, with exit code 0, while slurmctld is away."""
    errors = [{"description": "Failed while looking for jobs", "error_number": -1, "error": "Unspecified error"}]
    with pytest.raises(SchedulerError, match="Slurm does not answer: squeue: Failed while looking for jobs"):
        parse_squeue_json(json.dumps({"errors": errors, "jobs": []}))


def test_nor_is_one_that_is_torn():
    with pytest.raises(SchedulerError, match="what squeue --json says cannot be read"):
        parse_squeue_json('{"jobs": [{"job_id": 7, "job_st')


def test_a_requeued_job_waits():
    requeued = job(job_state=["PENDING", "REQUEUED"], state_reason="BeginTime")
    assert requeued.is_alive and requeued.is_waiting and requeued.reason == "BeginTime"


def test_without_json_the_format_that_was_asked_for_is_read():
    line = "\t".join(["7", "PENDING", "Resources", "", "N/A"])
    assert len(line.split("\t")) == len(TEXT_FORMAT.split("\t"))
    found = parse_squeue_text(line + "\nslurm says something else\n")
    assert list(found) == ["7"]
    assert (found["7"].reason, found["7"].start, found["7"].is_waiting) == ("Resources", "", True)


@pytest.mark.parametrize(
    ("gres", "gpus"), [("gpu:8", 8), ("gpu:a100:8(S:0-1)", 8), ("(null)", 0), ("nic:2,gpu:a100:4", 4)]
)
def test_a_nodes_gpus_are_read_from_its_gres(gres, gpus):
    assert _node_group(f"gpu1\t8\t{gres}\t64\t524288\t7-00:00:00\tup").gpus == gpus


@pytest.mark.parametrize(("limit", "seconds"), [("7-00:00:00", 604800), ("1:30:00", 5400), ("30:00", 1800)])
def test_a_partitions_time_limit_is_read(limit, seconds):
    assert _node_group(f"gpu1\t8\tgpu:8\t64+\t524288+\t{limit}\tup").max_time_s == seconds
    assert _node_group("gpu1\t8\tgpu:8\t64\t524288\tinfinite\tdown").max_time_s is None
