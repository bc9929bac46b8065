"""What this machine needs to run a job, before anything starts."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from made_runs import ANY_PROGRAM

from cpm_cluster.launch.plan import Program
from cpm_cluster.runs.run import RunError, Submission, new_run_id
from cpm_cluster.schedulers import SchedulerError, local, open_scheduler

HERE = Program("torchrun", sys.executable, 2, ())
ELSEWHERE = Program("torchrun", "/opt/python", 2, ())


@pytest.fixture
def plan(made_run):
    """The plan of a training here, with these files."""

    def make(program=HERE, **trainer):
        return replace(made_run(program=program).run.plan, trainer=trainer or {"data": {}})

    return make


def test_a_trainer_without_torch_is_told_how_to_get_it(plan, monkeypatch):
    monkeypatch.setattr(local, "find_spec", lambda name: None if name == "torch" else object())
    with pytest.raises(SchedulerError, match=r"the trainer needs torch, which .* pip install 'cpm-cluster\[train\]'"):
        open_scheduler("local").require(plan())


def test_another_python_is_its_owners_business_and_a_command_needs_none(plan, made_run, monkeypatch):
    monkeypatch.setattr(local, "find_spec", lambda name: None)
    open_scheduler("local").require(plan(ELSEWHERE))
    open_scheduler("local").require(made_run(trainer=False, program=ANY_PROGRAM).run.plan)


@pytest.mark.parametrize("key", ["train", "eval", "init_from", "adapter", "tokenizer"])
def test_a_file_that_is_not_there_is_missed(plan, tmp_path, key):
    there, missing = tmp_path / "there", tmp_path / "missing"
    there.touch()
    train = [{"path": str(there)}, {"path": "builtin:python-reference"}]
    named = {"data": {"train": train, "eval": []}, "tokenizer": "bytes"}
    open_scheduler("local").require(plan(ELSEWHERE, **named))
    if key in named["data"]:
        named["data"][key].append({"path": str(missing)})
    else:
        named[key] = str(missing)
    with pytest.raises(RunError, match=f"the job names {missing}, which is not there or cannot be read"):
        open_scheduler("local").require(plan(ELSEWHERE, **named))


def test_a_machine_without_proc_and_prctl(plan, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(SchedulerError, match="local runs need Linux"):
        open_scheduler("local").require(plan())


def test_only_the_machine_that_started_a_run_knows_whether_it_lives(made_run):
    with pytest.raises(SchedulerError, match="was started on other-host; ask there"):
        open_scheduler("local").is_alive(made_run().run, Submission("local", "1", "other-host"))


def test_a_run_of_another_user_whose_controller_has_gone(made_run, monkeypatch):
    run, scheduler = made_run(new_run_id("local")).run, open_scheduler("local")
    monkeypatch.setattr(local.os, "geteuid", lambda: run.files.root.stat().st_uid + 1)
    with pytest.raises(SchedulerError, match="belongs to another user; only they and root see its processes"):
        scheduler.is_alive(run, Submission("local", str(1 << 22), platform.node()))


def test_the_controller_of_a_run_is_known_by_its_command_line(made_run):
    """Which every user can read, other than its environment."""
    run, scheduler = made_run(new_run_id("local")).run, open_scheduler("local")
    argv = ["bash", "-c", "sleep 60; exit", str(run.files.root / "submitit")]
    with subprocess.Popen(argv, start_new_session=True) as controller:
        submission = Submission("local", str(controller.pid), platform.node())
        deadline = time.monotonic() + 10
        while not scheduler.is_alive(run, submission):  # until it has become bash
            assert time.monotonic() < deadline
        os.killpg(controller.pid, signal.SIGKILL)
    assert not scheduler.is_alive(run, submission)


def test_one_look_at_this_machine_tells_of_any_number_of_runs(made_run, monkeypatch):
    living, ended = made_run(new_run_id("living")).run, made_run(new_run_id("ended")).run
    submission = Submission("local", str(1 << 22), platform.node())
    environment = {"PATH": os.environ["PATH"], "CPM_RUN_ID": living.id}
    with subprocess.Popen(["sleep", "60"], env=environment) as process:
        deadline = time.monotonic() + 10
        while not (look := open_scheduler("local").look())(living, submission):  # until it has become sleep
            assert time.monotonic() < deadline
        process.kill()
    monkeypatch.setattr(local, "processes_of_run", None)  # looked at /proc again
    assert look(living, submission) and not look(ended, submission)
    with pytest.raises(SchedulerError, match="ask there"):
        look(ended, Submission("local", "1", "other-host"))


def test_a_run_inherits_the_shell_but_not_the_place_of_a_job_around_it():
    shell = {"PATH": "/bin", "HOME": "/h", "CPM_RUNS_DIR": "/r", "CUDA_HOME": "/c"}
    around = {"SLURM_NODEID": "1", "SLURMD_NODENAME": "x", "SUBMITIT_EXECUTOR": "slurm", "CPM_MASTER_ADDR": "y"}
    found = local.surroundings({**shell, **around, "CPM_ATTEMPT": "3", "CPM_RUN_ID": "outer"}, "inner")
    assert found == {**shell, "CPM_RUN_ID": "inner"}
