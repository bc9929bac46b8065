"""The file of a calibration: written, read again, and refused with its line where it is wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from measured import MODELS, SUBJECT, measured_run, sweep

from cpm_cluster.planner.calibrate import calibrate
from cpm_cluster.planner.calibration import Calibration, Subject
from cpm_cluster.planner.calibration_file import calibration_text, file_name, find_calibration, read_calibration
from cpm_cluster.specs.problems import SpecError


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    runs = [measured_run(setup, f"run-{i}", (1.0, 1.0, 1.2, 0.9)) for i, setup in enumerate(sweep()[:4])]
    runs[0] = replace(runs[0], host_memory_bytes=2e10)
    return calibrate(runs, MODELS, "2026-01-31", "1.0")[0]


def written(folder: Path, calibration: Calibration, old: str = "", new: str = "") -> Path:
    text = calibration_text(calibration)
    assert old in text
    path = folder / file_name(calibration.subject)
    path.write_text(text.replace(old, new, 1) if old else text, encoding="utf-8")
    return path


def test_the_name_says_of_what() -> None:
    assert file_name(SUBJECT) == "cpmlive-flash-0.0.4-a100-80g-bmtrain.yaml"
    assert file_name(Subject("", "h100-80g", "fsdp")) == "no-image-h100-80g-fsdp.yaml"
    assert "/" not in file_name(Subject("registry.example:5000/../x:1", "a100-80g", "ddp"))


def test_what_was_written_is_read_again(tmp_path: Path, calibration: Calibration) -> None:
    read = read_calibration(written(tmp_path, calibration))
    assert (read.subject, read.runs, read.modes, read.date) == (SUBJECT, calibration.runs, ("full",), "2026-01-31")
    for mine, its in (
        (calibration.gpu_memory, read.gpu_memory),
        (calibration.host_memory, read.host_memory),
        (calibration.step_time, read.step_time),
    ):
        assert mine is not None
        assert its is not None
        assert its.multipliers == pytest.approx(mine.multipliers)
        assert its.noise == pytest.approx(mine.noise)
        for row, again in zip(mine.covariance, its.covariance, strict=True):
            assert again == pytest.approx(row)


def test_only_the_calibration_of_the_very_subject_is_found(tmp_path: Path, calibration: Calibration) -> None:
    written(tmp_path, calibration)
    assert find_calibration(tmp_path, SUBJECT) is not None
    assert find_calibration(tmp_path, replace(SUBJECT, engine="fsdp")) is None
    assert find_calibration(tmp_path, replace(SUBJECT, image="cpmlive-flash-0.0.4")) is None  # the same file name


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("engine: bmtrain", "engin: bmtrain", ":4:1: engin: is not a known key (did you mean engine?)"),
        ("date: '2026-01-31'", "date: yesterday", ":7:7: date: "),
        ("whole: ", "hole: ", "gpu_memory.multipliers: write one of each of whole, sharded, activations or constant"),
        ("noise: ", "noise: -", "gpu_memory.noise: "),
        ("runs: 4", "runs: many", "gpu_memory.runs: "),
        ("compute: ", "compute: 1000", "step_time.multipliers.compute: "),
        ("image: cpmlive-flash:0.0.4", "image: [", "is not valid YAML"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(
    tmp_path: Path, calibration: Calibration, old: str, new: str, what: str
) -> None:
    path = written(tmp_path, calibration, old, new)
    with pytest.raises(SpecError) as refused:
        read_calibration(path)
    assert what in str(refused.value)
    assert str(refused.value).startswith(f"{path}:")


def test_a_covariance_that_none_can_be_is_refused(tmp_path: Path, calibration: Calibration) -> None:
    scaling = calibration.step_time
    assert scaling is not None
    bad = replace(scaling, covariance=((0.01, 0.5, 0.0), (0.5, 0.01, 0.0), (0.0, 0.0, 0.01)))
    with pytest.raises(SpecError, match=r"step_time\.covariance: is no covariance of 3 multipliers"):
        read_calibration(written(tmp_path, replace(calibration, step_time=bad)))
