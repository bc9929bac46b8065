"""A run as its launcher sees it: torchrun, what the ranks print and where, and how they end when others die."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_runs import paired
from training_ranks import finish, free_port, wait_for

from cpm_cluster.training.finetune import main

pytestmark = pytest.mark.timeout(90)

PROGRAM = ["-m", "cpm_cluster.training.finetune"]
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")


def torchrun(run) -> list[str]:
    """Return the command line for two ranks on this machine, as a launcher writes it for each node."""
    options = f"--nnodes=1 --node_rank=0 --nproc_per_node=2 --master_addr=127.0.0.1 --master_port={free_port()}"
    settings = run.write_settings()
    return [sys.executable, "-m", "torch.distributed.run", *options.split(), "--max_restarts=0", *PROGRAM, settings]


def ended(pid: int) -> bool:
    """Tell whether a process has ended, whether or not anyone has collected it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def python(code: str, *arguments: object) -> subprocess.CompletedProcess:
    """Run some lines of Python in a process of their own."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=30, check=False
    )


def test_the_program_runs_under_torchrun_and_alone(tiny_run):
    grouped, alone = tiny_run("grouped"), tiny_run("alone", expected_world_size=1)

    commands = [torchrun(grouped), [sys.executable, *PROGRAM, alone.write_settings()]]
    programs = [subprocess.Popen(command) for command in commands]

    assert [program.wait(timeout=60) for program in programs] == [0, 0]
    assert grouped.json("outcome.json")["outcome"] == alone.json("outcome.json")["outcome"] == "finished"
    assert grouped.json("progress.json")["world_size"] == 2


def test_each_rank_says_where_it_runs_and_the_first_says_how_it_goes(tiny_run):
    run = tiny_run(**{"training.log_every": 2})

    assert run.train() == [0, 0]

    for rank in (0, 1):
        first_line = run.log(rank).splitlines()[0]
        where = rf"rank {rank} of 2: host {re.escape(socket.gethostname())} pid \d+ device cpu"
        assert re.fullmatch(rf"{where} torch {re.escape(torch.__version__)}", first_line)
    step = r"step {}/6 loss \d\.\d{{4}} lr \d\.\d\de-\d\d grad_norm \d+\.\d{{3}} tokens/s \d+"
    expected = [
        r"train data: 7 samples of \d+ tokens",
        r"eval data: 7 samples of \d+ tokens",
        r"attention: \w+( \(.*\))?",
        step.format(2),
        step.format(3) + r" eval_loss \d\.\d{4}",
        step.format(4),
        step.format(6) + r" eval_loss \d\.\d{4}",
        "finished after step 6",
    ]
    told = run.log(0).splitlines()[1:]
    assert len(told) == len(expected)
    for line, pattern in paired(told, expected):
        assert re.fullmatch(pattern, line), line
    assert len(run.log(1).splitlines()) == 1


def test_a_crash_in_native_code_leaves_its_last_words_in_the_log_of_the_attempt(tmp_path):
    log = tmp_path / "logs/rank-3.log"
    log.parent.mkdir()
    log.write_text("earlier\n")

    crashed = python(
        "import ctypes, os, pathlib, sys\n"
        "from cpm_cluster.training.rank_process import send_output_to\n"
        "send_output_to(pathlib.Path(sys.argv[1]))\n"
        "print('from Python')\n"
        "os.write(2, b'from C\\n')\n"
        "ctypes.string_at(0)\n",
        log,
    )

    assert crashed.returncode == -signal.SIGSEGV
    assert (crashed.stdout, crashed.stderr) == ("", "")
    assert log.read_text().startswith("earlier\nfrom Python\nfrom C\nFatal Python error: Segmentation fault")


def test_a_log_that_cannot_be_written_is_named(tiny_run, monkeypatch, capsys):
    run = tiny_run()
    monkeypatch.setenv("CPM_LOG_DIR", str(run.directory / "data.jsonl"))

    assert main([run.write_settings()]) == 2

    assert "CPM_LOG_DIR: cannot write" in run.json("errors/rank-0.json")["message"]
    assert capsys.readouterr().err.endswith("data.jsonl/rank-0.log: File exists\n")


@linux_only
def test_ranks_whose_launcher_is_killed_save_and_end_and_the_run_can_go_on(tiny_run, monkeypatch):
    run, straight = tiny_run("run", **{"training.schedule": "constant"}), tiny_run("straight")
    run.change("training.steps", 100_000)
    run.change("training.checkpoint.every", 100_000)
    ranks = run.start(torchrun=True)
    wait_for(lambda: run.steps_recorded > 2)
    run.ask_to_stop()
    assert finish(ranks) == [0, 0]
    first_stop = run.json("outcome.json")["step"]
    run.withdraw_stop()

    monkeypatch.setenv("CPM_LOG_DIR", str(run.directory / "logs"))
    launcher = subprocess.Popen(torchrun(run))
    try:
        wait_for(lambda: run.steps_recorded > first_stop + 2)
    finally:
        launcher.kill()
    killed_at = time.monotonic()
    logs = [run.directory / f"logs/rank-{rank}.log" for rank in (0, 1)]
    pids = [int(re.search(r"pid (\d+)", log.read_text()).group(1)) for log in logs]
    wait_for(lambda: all(ended(pid) for pid in pids))

    launcher.wait()
    assert time.monotonic() - killed_at < 20
    assert f"continuing after step {first_stop}\n" in logs[0].read_text()
    outcome = run.json("outcome.json")
    assert outcome["outcome"] == "stopped" and outcome["checkpoint_step"] == outcome["step"] > first_stop + 2
    steps = outcome["step"] + 2
    run.change("training.steps", steps)
    assert run.train(torchrun=True) == [0, 0]
    straight.raw = {**run.raw, "output_dir": str(straight.directory)}
    assert straight.train() == [0, 0]
    assert [line["step"] for line in run.lines("metrics.jsonl")] == list(range(1, steps + 1))
    assert run.losses == straight.losses


@linux_only
def test_a_launcher_that_died_before_the_kernel_was_told_is_noticed():
    orphan = python(
        "import os\n"
        "from cpm_cluster.training import rank_process\n"
        "parents = iter([4711, 1])\n"
        "os.getppid = lambda: next(parents)\n"
        "rank_process.end_with_launcher()\n"
        "print('still here')\n"
    )

    assert orphan.returncode == -signal.SIGTERM
    assert orphan.stdout == ""


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_a_rank_whose_peer_is_killed_ends_with_a_recorded_error(tiny_run, zero_stage):
    run = tiny_run(
        **{"training.steps": 100_000, "training.checkpoint.every": 100_000, "training.zero_stage": zero_stage}
    )
    ranks = run.start()
    wait_for(lambda: run.steps_recorded > 2)

    os.kill(ranks[1].pid, signal.SIGKILL)

    assert finish(ranks, seconds=20) == [1, -signal.SIGKILL], run.log()
    error = run.json("errors/rank-0.json")
    assert error["user_error"] is False and "onnection" in error["message"]
    assert run.json("progress.json")["phase"] == "failed"
