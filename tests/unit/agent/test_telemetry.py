"""Samples of real processes that stand for ranks: when they are taken, what is in them, and that nothing stops them."""

from __future__ import annotations

import json
import os
import time
from contextlib import contextmanager

import pytest
from made_runs import TORCHRUN, container
from processes import program, wait_for

from cpm_cluster.agent import telemetry as module
from cpm_cluster.agent.process_tree import descendants, end_all
from cpm_cluster.agent.ranks import of_program, ranks
from cpm_cluster.agent.surroundings import node_facts
from cpm_cluster.agent.telemetry import Telemetry
from cpm_cluster.launch.plan import Setting
from cpm_cluster.runs.records import read_lines

RANKS = """
RANK=0 LOCAL_WORLD_SIZE=2 NCCL_DEBUG=WARN sleep 60 &
RANK=1 LOCAL_WORLD_SIZE=2 NCCL_DEBUG=INFO sleep 60 &
echo ready; wait
"""
SECRET = {"TOKEN": "hidden-1", "NCCL_KEY": "hidden-2", "OTHER": "hidden-3"}


@pytest.fixture(autouse=True)
def shorter_times(monkeypatch):
    """The same order of things in less time."""
    for name, seconds in (("INTERVAL_S", 0.6), ("SETTLE_S", 0.2), ("LOOK_S", 0.05)):
        monkeypatch.setattr(module, name, seconds)


class Watched:
    """A run's telemetry, and what it has written."""

    def __init__(self, run):
        facts = {"CPM_MASTER_ADDR": "10.0.0.1", "CPM_MASTER_PORT": "61000", "CPM_ATTEMPT": "1"}
        self.run, self.node = run, node_facts(run.files, {**facts, "SLURMD_NODENAME": "n1"})
        self.path = run.files.telemetry("n1")
        self.telemetry = Telemetry(run.files, run.plan, self.node)

    def lines(self, kind="sample"):
        return [line for line in read_lines(self.path) if line["kind"] == kind]

    def poll_until(self, condition):
        wait_for(lambda: self.telemetry.poll() or condition())

    def sampled(self, count=1):
        """The samples, once there are so many."""
        self.poll_until(lambda: len(self.lines()) >= count)
        return self.lines()

    @contextmanager
    def ranks(self, script=RANKS, **variables):
        log_dir = str(self.run.files.node_dir(1, 0))
        found = {
            "CPM_LOG_DIR": log_dir,
            "MASTER_ADDR": "10.0.0.1",
            "MASTER_PORT": "61000",
            "WORLD_SIZE": "2",
            **variables,
        }
        with program(script, env=found) as root:
            try:
                wait_for(lambda: len(self._ranks_below(root, log_dir)) == script.count("RANK="))
                self.telemetry = Telemetry(self.run.files, self.run.plan, self.node)
                yield root
            finally:
                end_all(lambda: descendants(root.pid), 0)

    def _ranks_below(self, root, log_dir):
        return ranks(of_program(log_dir, descendants(root.pid), lambda name: False))


@pytest.fixture
def watched(made_run):
    """A run of two ranks to be watched; `watched(gpus_per_node=1)` for another plan."""

    def watch(**plan):
        return Watched(made_run(**{"program": TORCHRUN, **plan}).run)

    return watch


def test_a_sample_of_the_ranks(watched):
    it = watched()
    with it.ranks():
        (sample,) = it.sampled()
    assert abs(sample["time"] - time.time()) < 30 and sample["attempt"] == 1
    assert [rank["rank"] for rank in sample["ranks"]] == [0, 1]
    assert sample["rss_bytes"] == sum(rank["rss_bytes"] for rank in sample["ranks"]) > 0
    room = os.statvfs("/dev/shm")
    assert sample["shm"]["size_bytes"] == room.f_blocks * room.f_frsize
    assert sample["disk"]["run_dir_free_bytes"] > 0
    assert sample["unread"] == {} and "gpus" not in sample
    assert sample["peaks"]["rss_bytes"] == sample["rss_bytes"]


def test_the_first_sample_comes_soon_after_the_ranks_the_next_after_the_interval(watched):
    it = watched()
    with it.ranks():
        it.telemetry.poll()
        assert it.lines() == []
        first, second = it.sampled(2)[:2]
    (environment,) = it.lines("nccl_environment")
    assert first["time"] - environment["time"] >= 0.2
    assert 0.3 <= second["time"] - first["time"] < 10


def test_without_any_rank_the_program_itself_is_measured(watched):
    it = watched()
    with it.ranks("echo ready; sleep 60"):
        (sample,) = it.sampled()
    (measured,) = sample["ranks"]
    assert measured["rank"] is None and measured["rss_bytes"] > 0
    assert it.lines("nccl_environment") == []


def test_what_the_ranks_were_started_with_once_an_attempt(watched):
    planned = (Setting("NCCL_DEBUG", "WARN", "job"), Setting("NCCL_IB_HCA", "mlx5", "cluster"))
    it = watched(environment=planned, secrets=("TOKEN", "NCCL_KEY"))
    with it.ranks(NCCL_SOCKET_IFNAME="eth0", **SECRET):
        samples = it.sampled(2)
    (record,) = it.lines("nccl_environment")
    common = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "61000", "WORLD_SIZE": "2", "NCCL_SOCKET_IFNAME": "eth0"}
    assert record["ranks"] == {
        "0": {**common, "RANK": "0", "NCCL_DEBUG": "WARN"},
        "1": {**common, "RANK": "1", "NCCL_DEBUG": "INFO"},
    }
    assert {each["variable"]: each["how"] for each in record["differs"]} == {
        "NCCL_DEBUG": "differs between ranks",
        "NCCL_IB_HCA": "not as planned",
        "NCCL_SOCKET_IFNAME": "not planned",
    }
    assert samples[-1]["environment_differs"] == ["NCCL_DEBUG", "NCCL_IB_HCA", "NCCL_SOCKET_IFNAME"]
    assert "hidden" not in it.path.read_text()


def test_the_last_sample_is_taken_when_all_is_over(watched):
    it = watched()
    it.telemetry.close()
    (sample,) = it.lines()
    assert sample["ranks"] == [] and sample["shm"]["size_bytes"] > 0


def test_a_containers_shared_memory_is_gone_with_it_and_not_mistaken_for_the_machines(watched):
    it = watched(runtime="podman", container=container(shm_bytes=1 << 30))
    it.telemetry.close()
    (sample,) = it.lines()
    assert sample["shm"] is None and "the container has a /dev/shm of its own" in sample["unread"]["shm"]


def test_peaks_go_on_from_those_of_an_earlier_attempt(watched):
    it = watched()
    peaks = {"rss_bytes": 1 << 50, "oom_kills": 2}
    it.telemetry._write("sample", 1.0, {"peaks": peaks})
    it.telemetry = Telemetry(it.run.files, it.run.plan, it.node)
    it.telemetry.close()
    assert it.lines()[-1]["peaks"]["rss_bytes"] == 1 << 50
    assert it.lines()[-1]["peaks"]["oom_kills"] == 2


def test_a_file_that_somebody_has_spoilt_does_not_keep_the_training_from_starting(watched, capsys):
    it = watched()
    it.path.parent.mkdir()
    it.path.write_text('{"time": 1, "kind": "sample", "peaks": {"oom_kills": "many"}}\n')
    Telemetry(it.run.files, it.run.plan, it.node).poll()
    assert capsys.readouterr().err.startswith("cpm: no more telemetry: ValueError")


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """A stand-in that runs a shell script."""

    def install(script):
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    return install


def test_gpus(watched, nvidia_smi):
    nvidia_smi("echo 'GPU-a, 62464, 81920, 97, 61, 398.12, 0'")
    it = watched(gpus_per_node=1)
    with it.ranks():
        (sample,) = it.sampled()
    assert [gpu["memory_used_mib"] for gpu in sample["gpus"]] == [62464]
    assert sample["peaks"]["gpus"] == {"GPU-a": {"used_mib": 62464, "total_mib": 81920}}


def test_an_nvidia_smi_that_hangs_costs_the_gpus_and_no_time(watched, nvidia_smi, monkeypatch):
    nvidia_smi("exec sleep 60")
    it = watched(gpus_per_node=1)
    longest = 0.0
    with it.ranks():
        monkeypatch.setattr(it.telemetry._gpus, "_patience_s", 1.5)
        while len(it.lines()) < 2:
            started = time.monotonic()
            it.telemetry.poll()
            longest = max(longest, time.monotonic() - started)
            time.sleep(0.02)
    assert longest < 1.0
    for sample in it.lines():
        assert sample["gpus"] is None and "not asked again" in sample["unread"]["gpus"]
        assert sample["shm"] is not None


def test_the_end_does_not_wait_for_nvidia_smi_either(watched, nvidia_smi):
    nvidia_smi("exec sleep 60")
    it = watched(gpus_per_node=1)
    started = time.monotonic()
    it.telemetry.close()
    assert time.monotonic() - started < 5
    assert "did not answer in time" in it.lines()[0]["unread"]["gpus"]


def test_what_cannot_be_read_is_null_and_says_why(watched, monkeypatch):
    def refuse(pid):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(module.shared_memory, "seen_by", refuse)
    it = watched()
    with it.ranks():
        (sample,) = it.sampled()
    assert sample["shm"] is None and sample["unread"] == {"shm": "Permission denied"}
    assert sample["rss_bytes"] > 0


def test_a_defect_here_ends_the_telemetry_not_the_training(watched, monkeypatch, capsys):
    it = watched()

    def fail(*_):
        raise KeyError("x")

    monkeypatch.setattr(module.ranks, "memory", fail)
    with it.ranks():
        wait_for(lambda: it.telemetry.poll() or capsys.readouterr().err == "cpm: no more telemetry: KeyError: 'x'\n")
        it.telemetry.poll()
        it.telemetry.close()
    assert capsys.readouterr().err == "" and it.lines() == []


def test_a_folder_that_cannot_be_written_is_no_reason_to_stop(watched, capsys):
    it = watched()
    it.path.parent.write_text("in the way")
    it.telemetry.close()
    assert capsys.readouterr().err == ""


def test_a_line_that_was_torn_does_not_spoil_the_next(watched):
    it = watched()
    it.path.parent.mkdir()
    it.path.write_text('{"time": 1, "kind": "sam')
    it.telemetry.close()
    assert len(it.lines()) == 1
    assert json.loads(it.path.read_text().splitlines()[1])["kind"] == "sample"


def test_a_sample_costs_little(watched):
    it = watched()
    with it.ranks():
        it.sampled()
        before = time.process_time()
        for _ in range(10):
            it.telemetry._begin()
        assert (time.process_time() - before) / 10 < 0.05
