"""Naming, making and finding runs."""

from __future__ import annotations

import errno
import json
import re
from importlib.metadata import Distribution
from pathlib import Path

import pytest

from cpm_cluster.runs import provenance, snapshot
from cpm_cluster.runs.create import Records, create_run
from cpm_cluster.runs.records import read_json
from cpm_cluster.runs.run import (
    ID_PATTERN,
    RunError,
    all_runs,
    find_run,
    new_run_id,
    open_run,
    read_submission,
    run_directory,
)

RECORDS = Records(job=b"name: x  # \xc3\xa4\n", resolved="name: x\n", script="#!/bin/bash\n", fit="{}\n")


def test_ids_sort_by_time_also_within_a_second():
    ids = [new_run_id("my.job-1") for _ in range(300)]
    assert all(re.fullmatch(ID_PATTERN, run_id) for run_id in ids)
    assert ids == sorted(ids) and ids[0].startswith("my.job-1-")


@pytest.mark.parametrize("character", [" ", "%", ",", ":", "'", '"', "$", ";", "\\", "\n", "#", "(", "*"])
def test_a_path_that_slurm_or_docker_would_misread_is_refused(tmp_path, character):
    with pytest.raises(RunError, match=r"--runs-dir or CPM_RUNS_DIR"):
        run_directory(tmp_path / f"a{character}b", "x-20260102-030405-0001")


def test_a_path_in_any_language_is_taken(tmp_path):
    assert run_directory(tmp_path / "训练_é+=~@", "x").name == "x"


def test_a_relative_folder_of_runs_starts_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_directory(tmp_path.__class__("runs"), "x") == tmp_path / "runs/x"


@pytest.fixture
def runs_dir(made_run, tmp_path):
    for run_id in ("b-20260102-030405-0001", "a-20260102-030405-0002", "a-20251231-235959-ffff"):
        made_run(run_id)
    (tmp_path / "runs" / "no-run").mkdir()
    (tmp_path / "runs" / "c-20260102-030405-0003").mkdir()  # without a plan
    (tmp_path / "runs" / ".d-20260102-030405-0004.partial").mkdir()
    return tmp_path / "runs"


def test_runs_are_listed_newest_first_and_what_is_none_is_left_out(runs_dir):
    ids = [run.id for run in all_runs(runs_dir)]
    assert ids == ["a-20260102-030405-0002", "b-20260102-030405-0001", "a-20251231-235959-ffff"]
    assert list(all_runs(runs_dir / "nowhere")) == []


@pytest.mark.parametrize("name", ["b", "b-2026", "b-20260102-030405-0001"])
def test_a_run_is_found_by_the_beginning_of_its_id(runs_dir, name):
    assert find_run(runs_dir, name).id == "b-20260102-030405-0001"


def test_a_run_is_found_by_its_path_from_anywhere(runs_dir, tmp_path):
    assert find_run(tmp_path / "elsewhere", str(runs_dir / "b-20260102-030405-0001")).id.startswith("b-")


def test_names_that_find_nothing_or_too_much(runs_dir, tmp_path):
    with pytest.raises(
        RunError, match="a is the beginning of 2 runs: a-20260102-030405-0002, a-2025.*write more of it"
    ):
        find_run(runs_dir, "a")
    with pytest.raises(RunError, match="x is no run in .*cpm runs lists them"):
        find_run(runs_dir, "x")
    with pytest.raises(RunError, match="empty"):
        find_run(runs_dir, "")
    with pytest.raises(RunError, match="is no run in"):
        find_run(runs_dir, "x" * 300)  # longer than a file may be named
    with pytest.raises(RunError, match="there are no runs in .*cpm-submit JOB makes one"):
        find_run(tmp_path / "nowhere", None)


def test_a_run_whose_plan_is_broken_or_of_another_version(runs_dir):
    folder = runs_dir / "b-20260102-030405-0001"
    for content in ("", "[]", '{"format": 99}', '{"format": 1}'):
        (folder / "launch.json").write_text(content)
        with pytest.raises(RunError, match=r"launch\.json"):
            open_run(folder)


def test_a_run_of_someone_who_lets_nobody_read_it(runs_dir, monkeypatch):
    def refuse(*arguments, **options):  # root may read everything
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(RunError, match="b-20260102-030405-0001 cannot be read: Permission denied; its owner can let"):
        find_run(runs_dir, "b")
    assert list(all_runs(runs_dir)) == []


@pytest.mark.parametrize(
    "content", ['{"time": 1}', "[]", '{"scheduler": 5, "job_id": "1", "host": "h"}', "[" * 3000, '{"attempt": "x"}']
)
def test_a_damaged_submission_is_a_sentence_or_none(runs_dir, content):
    run = find_run(runs_dir, "b")
    run.files.submission.write_text(content)
    if content.startswith("["):
        assert read_submission(run) is None
    else:
        with pytest.raises(RunError, match=r"submission\.json is damaged"):
            read_submission(run)


@pytest.fixture
def plan_in(made_run):
    """The plan of a run that is still to be made below a folder."""

    def plan(runs_dir):
        return made_run("x-20260102-030405-0001", run_dir=str(runs_dir / "x-20260102-030405-0001")).run.plan

    return plan


def test_a_new_run_holds_its_records(plan_in, tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "train.py").write_text("x")
    run = create_run(plan_in(tmp_path / "new" / "runs"), RECORDS, tmp_path / "source")
    root = run.files.root
    assert run.files.job_file.read_bytes() == RECORDS.job
    assert (root / "code/train.py").exists() and (root / "package/__main__.py").exists()
    assert open_run(root).plan == run.plan
    assert read_json(run.files.provenance)["code"] == {
        "source": str(tmp_path / "source"),
        "files": 1,
        "bytes": 1,
        "commit": None,
        "changed": False,
    }
    assert (tmp_path / "new/runs/.gitignore").read_text() == "*\n"


def test_a_run_that_cannot_be_made_leaves_nothing(plan_in, tmp_path, monkeypatch):
    def full(source, target, **options):
        raise OSError(28, "No space left on device", str(source))

    monkeypatch.setattr(snapshot.shutil, "copy2", full)
    runs_dir = tmp_path / "there"
    runs_dir.mkdir()
    with pytest.raises(OSError, match="No space left on device; free some, or choose .*CPM_RUNS_DIR") as caught:
        create_run(plan_in(runs_dir), RECORDS, None)
    assert caught.value.filename == str(runs_dir)
    assert list(runs_dir.iterdir()) == []


def test_the_record_of_the_software_knows_no_nameless_packages(monkeypatch):
    """What pip leaves of a broken installation."""

    class Broken(Distribution):
        def read_text(self, filename):
            return None

        def locate_file(self, path):
            raise NotImplementedError

    monkeypatch.setattr(provenance, "distributions", lambda: [Broken(), *Distribution.discover(name="pytest")])
    assert list(provenance.provenance(None)["packages"]) == ["pytest"]


def test_the_record_of_the_software_holds_no_environment(monkeypatch):
    monkeypatch.setenv("A_TOKEN", "s3cret")
    assert "s3cret" not in json.dumps(provenance.provenance(None))
