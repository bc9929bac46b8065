"""What a dry run says of Slurm's queue, with stand-ins for Slurm's commands."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[1] / "schedulers"))

from slurm_clients import SlurmClients

from cpm_cluster.cli.submit import command

SINFO = "gpu1\t8\tgpu:8\t64\t524288\t7-00:00:00\tup\n"


@pytest.fixture
def clients(tmp_path, monkeypatch):
    stand_ins = SlurmClients(tmp_path / "clients")
    monkeypatch.setenv("PATH", str(stand_ins.bin))
    stand_ins.says("sinfo", SINFO)
    return stand_ins


@pytest.fixture
def dry_run(tmp_path, monkeypatch):
    """A dry run of a packaged job on this cluster, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(cluster, *options):
        words = ["quickstart", "--set", f"cluster={cluster}", "--set", "resources.nodes=1", "--dry-run", *options]
        result = CliRunner().invoke(command, words, standalone_mode=False)
        assert result.exception is None
        return result.stdout

    return run


def test_the_start_that_slurm_expects_is_one_line(clients, dry_run):
    start = time.time() + 86_400
    moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(start))
    said = f"sbatch: Job 58 to start at {moment} using 2 processors on nodes g2001 in partition gpu1"
    clients.says("sbatch", ("", said, 0))
    expected = f"Slurm expects to start it at {time.strftime('%F %H:%M', time.localtime(start))}, on g2001"
    assert expected in dry_run("sandbox").splitlines()
    assert json.loads(dry_run("sandbox", "--json"))["expected_start"] == expected


@pytest.mark.parametrize(
    ("command", "errors", "told"),
    [
        (
            "sbatch",
            "allocation failure: Invalid account",
            "Slurm refuses this job: allocation failure: Invalid account",
        ),
        ("sinfo", "Unable to contact slurm controller", "Slurm does not answer: Unable to contact slurm controller"),
    ],
)
def test_a_refusal_is_told_and_the_dry_run_goes_on(clients, dry_run, command, errors, told):
    clients.says(command, ("", errors, 1))
    text = dry_run("sandbox")
    assert told in text and "#SBATCH --partition=gpu1" in text


def test_a_machine_without_slurm_has_nothing_to_say(clients, dry_run):
    clients.remove("sbatch")
    assert "Slurm expects" not in dry_run("sandbox")
    assert json.loads(dry_run("sandbox", "--json"))["expected_start"] is None


def test_a_job_for_this_machine_asks_no_slurm(clients, dry_run):
    assert "Slurm expects" not in dry_run("local")
    assert clients.calls("sbatch") == []
