"""nvidia-smi is asked without being waited for; here a stand-in says what a test wants."""

from __future__ import annotations

import os
import time

import pytest
from processes import is_gone, wait_for

from cpm_cluster.agent.gpu_query import FIELDS, GpuQuery, parsed
from cpm_cluster.agent.process_tree import descendants, reap

LINE = "GPU-a, 62464, 81920, 97, 61, 398.12, 0"
BROKEN = "GPU-b, [N/A], 81920, [Unknown Error], 62, [Not Supported], [N/A]"


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """A stand-in that runs a shell script, and notes how often."""
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    def install(script):
        program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n{script}\n')
        program.chmod(0o755)
        return lambda: (tmp_path / "calls").read_text().splitlines()

    return install


def answer(query):
    query.ask()
    found = []
    wait_for(lambda: found or found.extend(filter(lambda each: each is not None, [query.answer()])) or found)
    return found[0]


def test_one_question_for_all_gpus_in_numbers(nvidia_smi):
    calls = nvidia_smi(f"echo '{LINE}'; echo '{BROKEN}'")
    first, second = answer(GpuQuery(()))
    assert first == {
        "uuid": "GPU-a",
        "memory_used_mib": 62464,
        "memory_total_mib": 81920,
        "utilisation_percent": 97,
        "temperature_c": 61,
        "power_w": 398.12,
        "ecc_uncorrected": 0,
    }
    assert (second["memory_total_mib"], second["temperature_c"]) == (81920, 62)
    assert [second[name] for name in ("memory_used_mib", "utilisation_percent", "power_w")] == [None] * 3
    (call,) = calls()
    assert call.startswith("--query-gpu=uuid,memory.used,") and call.endswith(" --format=csv,noheader,nounits")


def test_only_the_gpus_of_the_step_and_one_that_was_lost_has_no_numbers():
    found = parsed(
        f"{LINE}\n{BROKEN}\nUnable to determine the device handle for GPU0: Unknown Error\n", ["GPU-a", "GPU-c"]
    )
    assert [gpu["uuid"] for gpu in found] == ["GPU-a", "GPU-c"]
    assert {found[1][name] for name, _ in FIELDS} == {None}


def test_a_refusal_is_told_and_does_not_keep_it_from_asking_again(nvidia_smi):
    nvidia_smi("echo 'NVIDIA-SMI has failed'; exit 9")
    query = GpuQuery(["GPU-a"])
    assert answer(query) == [] and query.problem == "nvidia-smi: NVIDIA-SMI has failed"
    nvidia_smi(f"echo '{LINE}'")
    assert answer(query)[0]["power_w"] == 398.12 and query.problem == ""


def test_a_machine_without_it(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    query = GpuQuery(())
    assert answer(query) == [] and query.problem == "nvidia-smi: No such file or directory"


def test_one_that_hangs_holds_nobody_up_is_killed_and_never_asked_again(nvidia_smi):
    calls = nvidia_smi("exec sleep 60")
    query = GpuQuery((), patience_s=1.0)
    started = time.monotonic()
    query.ask()
    assert query.answer() is None and time.monotonic() - started < 0.9
    (pid,) = descendants(os.getpid())
    assert answer(query) == [] and query.problem == "nvidia-smi did not answer in time, and is not asked again"
    wait_for(lambda: is_gone(pid))
    assert answer(query) == [] and len(calls()) == 1


def test_its_answer_counts_although_somebody_else_has_collected_its_status(nvidia_smi):
    nvidia_smi(f"echo '{LINE}'")
    query = GpuQuery(())
    query.ask()
    wait_for(lambda: descendants(os.getpid()) == [])
    reap()
    assert query.answer()[0]["uuid"] == "GPU-a"
