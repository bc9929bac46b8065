"""What a run has used at most, as cpm status says it."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from cpm_cluster.cli.peaks_line import peaks_line
from cpm_cluster.cli.status import command

GIB = 1 << 30
GPU = {"node": "n1", "uuid": "GPU-a", "used_mib": 62464, "total_mib": 81251}
WHOLE = {
    "time": 1.0,
    "shm": {"node": "n1", "used_bytes": int(0.3 * GIB), "size_bytes": 4 * GIB},
    "gpu": GPU,
    "gpus": [GPU],
    "host": {"node": "n1", "rss_bytes": 12 * GIB},
    "oom_kills": 0,
    "ecc_uncorrected": 0,
    "environment_differs": [],
}


def test_all_that_was_measured():
    assert peaks_line(WHOLE) == "peak: shm 307.2 MiB of 4 GiB · GPU 61 GiB of 79.3 GiB · host 12 GiB"


def test_what_was_not_measured_is_left_out():
    assert peaks_line({**WHOLE, "shm": None, "gpu": None}) == "peak: host 12 GiB"
    assert peaks_line({**WHOLE, "shm": None, "gpu": None, "host": None}) == "peak: host not measured"


@pytest.mark.parametrize(
    ("trouble", "told"),
    [
        ({"oom_kills": 1}, " · 1 process killed for want of memory"),
        ({"oom_kills": 2}, " · 2 processes killed for want of memory"),
        ({"ecc_uncorrected": 1}, " · 1 uncorrected ECC error"),
        (
            {"environment_differs": ["NCCL_DEBUG", "NCCL_IB_HCA"]},
            " · environment of the ranks is not as planned: NCCL_DEBUG, NCCL_IB_HCA",
        ),
    ],
)
def test_what_is_wrong_is_said_at_the_end(trouble, told):
    assert peaks_line({**WHOLE, **trouble}).endswith(f"host 12 GiB{told}")


@pytest.fixture
def status(made_run):
    """The output of `cpm status` for a run whose agent has left a telemetry file, or none."""

    def ask(*words, telemetry=True):
        made = made_run().submitted().phase("training").exited(0)
        if telemetry:
            peaks = {"shm": {"used_bytes": GIB, "size_bytes": 4 * GIB}, "rss_bytes": GIB}
            sample = {"time": 5.0, "kind": "sample", "attempt": 1, "peaks": peaks}
            made.file("telemetry/n1.jsonl", json.dumps(sample) + "\n")
        done = CliRunner().invoke(command, [str(made.run.files.root), *words], standalone_mode=False)
        assert done.exception is None
        return done.output

    return ask


def test_status_shows_the_line(status):
    assert "\n  peak: shm 1 GiB of 4 GiB · host 1 GiB\n" in status()


def test_status_of_a_run_that_was_not_measured(status):
    assert "peak" not in status(telemetry=False)


def test_status_as_json(status):
    found = json.loads(status("--json"))["telemetry"]
    assert found["shm"] == {"node": "n1", "used_bytes": GIB, "size_bytes": 4 * GIB}
    assert found["host"]["rss_bytes"] == GIB


def test_there_is_no_such_key_where_nothing_was_measured(status):
    assert "telemetry" not in json.loads(status("--json", telemetry=False))
