"""The summary of what the agents measured, from the last lines of their files."""

from __future__ import annotations

import json

from cpm_cluster.runs.telemetry import TAIL_BYTES, last_sample, raised, run_telemetry, summary

GIB = 1 << 30


def gpu(uuid, used, total=80_000, ecc=0):
    return {"uuid": uuid, "memory_used_mib": used, "memory_total_mib": total, "ecc_uncorrected": ecc}


def sample(time=1.0, **measured):
    return {"time": time, "kind": "sample", "shm": None, "rss_bytes": 0, **measured}


def shm(used, size=4 * GIB):
    return {"used_bytes": used, "size_bytes": size, "files": {}}


def peaks_of(*samples):
    peaks = {}
    for each in samples:
        peaks = raised(peaks, each)
    return peaks


def test_peaks_only_rise():
    peaks = peaks_of(
        sample(shm=shm(10), rss_bytes=5, gpus=[gpu("a", 7), gpu("b", 1)]),
        sample(shm=shm(3), rss_bytes=9, gpus=[gpu("a", 2), gpu("b", 4)]),
        sample(shm=None, rss_bytes=0, gpus=None),
    )
    assert peaks["shm"] == {"used_bytes": 10, "size_bytes": 4 * GIB}
    assert peaks["rss_bytes"] == 9
    assert {uuid: peak["used_mib"] for uuid, peak in peaks["gpus"].items()} == {"a": 7, "b": 4}


def test_what_was_never_measured_has_no_peak():
    peaks = peaks_of(sample(), sample(gpus=[gpu("a", None)]))
    assert peaks == {"rss_bytes": 0}


def test_errors_of_a_gpus_memory_stay_known_when_the_gpu_is_gone():
    peaks = peaks_of(sample(gpus=[gpu("a", 1, ecc=2)]), sample(gpus=[gpu("a", None, None, None)]))
    assert peaks["ecc_uncorrected"] == 2


def test_the_summary_tells_of_the_node_and_the_gpu_that_came_nearest_to_the_end():
    first = peaks_of(sample(shm=shm(2 * GIB), rss_bytes=3, gpus=[gpu("a", 40_000), gpu("b", 70_000)]))
    second = peaks_of(sample(shm=shm(1 * GIB, 1 * GIB), rss_bytes=4, gpus=[gpu("c", 39_000, 40_000)]))
    found = summary(
        {
            "n1": sample(5.0, peaks={**first, "oom_kills": 1}, environment_differs=["NCCL_B", "NCCL_A"]),
            "n2": sample(7.0, peaks={**second, "oom_kills": 2}, environment_differs=["NCCL_B"]),
        }
    )
    assert found["time"] == 7.0
    assert found["shm"] == {"node": "n2", "used_bytes": GIB, "size_bytes": GIB}
    assert (found["gpu"]["node"], found["gpu"]["uuid"]) == ("n2", "c")
    assert [(each["node"], each["uuid"]) for each in found["gpus"]] == [("n1", "a"), ("n1", "b"), ("n2", "c")]
    assert found["host"] == {"node": "n2", "rss_bytes": 4}
    assert (found["oom_kills"], found["environment_differs"]) == (3, ["NCCL_A", "NCCL_B"])


def test_a_run_without_gpus_and_one_without_samples():
    found = summary({"n1": sample(peaks={"rss_bytes": 0})})
    assert (found["shm"], found["gpu"], found["gpus"], found["host"]) == (None, None, [], None)
    assert summary({}) is None


def test_the_end_of_a_file_is_enough(tmp_path):
    path = tmp_path / "n1.jsonl"
    with path.open("w") as file:
        while file.tell() < 3 * TAIL_BYTES:
            file.write(json.dumps(sample(0.0, peaks={"rss_bytes": 1})) + "\n")
        file.write(json.dumps(sample(8.0, peaks={"rss_bytes": 2})) + "\n")
        file.write(json.dumps({"kind": "nccl_environment", "time": 9.0}) + '\n{"kind": "sample", "ti')
    assert last_sample(path)["time"] == 8.0
    assert run_telemetry(tmp_path)["host"] == {"node": "n1", "rss_bytes": 2}


def test_files_without_a_sample(tmp_path):
    (tmp_path / "n1.jsonl").write_text('[]\nnull\n{"kind": "nccl_environment"}\n\xff')
    assert last_sample(tmp_path / "n1.jsonl") is None
    assert last_sample(tmp_path / "absent.jsonl") is None
    assert run_telemetry(tmp_path) is None
    assert run_telemetry(tmp_path / "nowhere") is None
