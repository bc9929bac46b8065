"""What cannot be done is said in a sentence, with an exit code, and leaves nothing behind."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PR_CAPBSET_DROP = 24
CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 1, 2


def tree(*folders: Path) -> dict[str, object]:
    """Every path below, with its content or kind and its time."""
    found: dict[str, object] = {}
    for folder in folders:
        for path in sorted([folder, *folder.rglob("*")]):
            content = path.read_bytes() if path.is_file() else None
            found[str(path)] = (content, path.lstat().st_mtime_ns)
    return found


def copied(runs, name: str) -> Path:
    """A job file that ships with cpm-cluster, in the user's folder."""
    return Path(shutil.copy(ROOT / "jobs" / name, runs.jobs))


def assert_refused(done, code, *words):
    """One message for a person: no traceback, nothing on stdout."""
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr and "Errno" not in done.stderr and "defect" not in done.stderr
    assert done.stdout == ""
    for word in words:
        assert word in done.stderr


def test_a_job_for_a_cluster_says_what_one_can_do_without_it(runs):
    done = runs.submit(copied(runs, "lora_100b.yaml"))
    assert_refused(done, 3, "no sbatch", "--dry-run", "--export", "quickstart")
    assert not runs.runs_dir.exists()


def test_export_prepares_the_run_and_writes_a_script_that_bash_takes(runs):
    done = runs.submit(copied(runs, "lora_100b.yaml"), "--export", "job.sbatch")
    assert done.returncode == 0, done.stderr
    script, run = runs.jobs / "job.sbatch", runs.newest()
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    assert os.access(script, os.X_OK)
    assert f"sbatch {script.name}" in done.stdout and str(run.folder) in done.stdout
    assert script.read_text() == run.text("job.sbatch")
    assert (run.folder / "package/cpm_cluster/agent/node.py").exists() and (run.folder / "trainer.json").exists()
    assert run.status()["state"] == "prepared"
    assert "prepared" in runs.cpm("runs").stdout
    assert_refused(runs.cpm("cancel"), 2, "never submitted", "scancel")
    assert_refused(runs.cpm("logs"), 2, "has not begun")
    assert_refused(runs.cpm("logs", "-f"), 2, "never submitted")
    assert_refused(runs.cpm("resume"), 3, "sbatch")


def test_export_that_cannot_be_written_or_has_no_slurm_prepares_nothing(runs):
    assert_refused(runs.submit(copied(runs, "lora_100b.yaml"), "--export", "no/folder/x"), 2, "no folder", "--export")
    assert_refused(runs.submit(runs.bash("true"), "--export", "x"), 2, "cluster local has no Slurm")
    assert not runs.runs_dir.exists()


@pytest.mark.parametrize("name", ["lora_100b.yaml", "full_100b.yaml"])
def test_a_dry_run_touches_nothing(runs, name):
    job = copied(runs, name)
    before = tree(runs.root)
    for words in ((), ("--json",)):
        assert runs.submit(job, "--dry-run", *words).returncode == 0
    assert runs.submit(job, "--explain", "all").returncode == 0
    assert tree(runs.root) == before


def test_options_that_exclude_each_other(runs):
    job = runs.bash("true")
    for words in (["--dry-run", "--detach"], ["--export", "x", "--dry-run"], ["--explain", "all", "--detach"]):
        assert_refused(runs.submit(job, *words), 2, "exclude each other", "cpm-submit --help")
    done = runs.submit(job, "--dry-run", "--detach", "--json")
    assert "exclude each other" in json.loads(done.stdout)["error"]
    assert not runs.runs_dir.exists()


@pytest.mark.parametrize("name", ["with space", "per%cent", "com,ma", "quo'te"])
def test_a_runs_folder_that_slurm_or_docker_would_misread(runs, name):
    done = runs.submit(runs.bash("true"), "--runs-dir", runs.root / name)
    assert_refused(done, 2, repr(next(c for c in name if not c.isalpha())), "--runs-dir", "CPM_RUNS_DIR")
    assert not (runs.root / name).exists()


def test_a_runs_folder_in_any_language(runs):
    folder = runs.root / "训练-ä"
    done = runs.submit(runs.bash('echo "$CPM_RUN_DIR"'), env={"CPM_RUNS_DIR": str(folder)})
    assert done.returncode == 0, done.stdout + done.stderr
    assert str(folder) in runs.cpm("logs", "--runs-dir", folder).stdout


def test_a_runs_folder_that_is_made_on_the_way_stays_out_of_git(runs):
    done = runs.submit(runs.bash("true"), "--runs-dir", "new/folder")
    assert done.returncode == 0
    assert (runs.jobs / "new/folder/.gitignore").read_text() == "*\n"


def test_a_runs_folder_that_is_a_file_or_cannot_be_written(runs):
    (runs.root / "file").touch()
    assert_refused(runs.submit(runs.bash("true"), "--runs-dir", runs.root / "file"), 2, "file")
    below = runs.submit(runs.bash("true"), "--runs-dir", runs.root / "file/below")
    assert_refused(below, 2, "no run can be made there: Not a directory", "--runs-dir")
    done = runs.submit(runs.bash("true"), "--runs-dir", "/sys/cpm-runs")
    assert_refused(done, 2, "/sys/cpm-runs: no run can be made there: ", "--runs-dir")


def test_a_job_file_that_is_not_there_is_a_folder_or_is_none(runs):
    (runs.jobs / "binary.yaml").write_bytes(b"\x00\xff\xfe")
    (runs.jobs / "empty.yaml").touch()
    assert_refused(runs.submit("missing.yaml"), 2, "missing.yaml: cannot be read: No such file or directory")
    assert_refused(runs.submit(runs.jobs), 2, "cannot be read: Is a directory")
    assert_refused(runs.submit("binary.yaml"), 2, "binary.yaml")
    assert_refused(runs.submit("empty.yaml"), 2, "empty.yaml")
    assert_refused(runs.submit("no\nfile\x1b[31m.yaml"), 2, "no\\nfile\\x1b")
    assert not runs.runs_dir.exists()


def test_what_the_user_may_not_read_or_write(runs):
    job = runs.bash("true")
    (runs.jobs / "unreadable.yaml").write_text(job.read_text())
    (runs.jobs / "unreadable.yaml").chmod(0)
    (runs.root / "read-only").mkdir(mode=0o555)
    unreadable = runs.submit("unreadable.yaml", preexec_fn=obey_modes)
    assert_refused(unreadable, 2, "unreadable.yaml: cannot be read: Permission denied")
    read_only = runs.submit(job, "--runs-dir", runs.root / "read-only/runs", preexec_fn=obey_modes)
    assert_refused(read_only, 2, "read-only/runs: no run can be made there: Permission denied")


def obey_modes():
    """Root, too, obeys a file's mode once it may not have these capabilities (capabilities(7))."""
    if os.geteuid() == 0:
        for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
            ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)


def test_data_that_is_not_there_is_missed_before_anything_starts(runs):
    done = runs.submit(runs.job(data={"train": "nowhere.jsonl"}))
    assert_refused(done, 2, f"{runs.jobs / 'nowhere.jsonl'}, which is not there or cannot be read")
    assert not runs.runs_dir.exists()


def test_a_verb_that_there_is_not(runs):
    assert_refused(runs.cpm("statsu"), 2, "did you mean status")
    assert_refused(runs.cpm("jobs/quickstart.yaml"), 2, "cpm submit jobs/quickstart.yaml")
    assert_refused(runs.cpm("status", "--frob"), 2, "--frob", "cpm status --help")


def test_a_reader_that_has_seen_enough(runs):
    """`cpm-submit … --dry-run | head -1`"""
    job = copied(runs, "full_100b.yaml")
    reading, writing = os.pipe()
    os.close(reading)
    argv = runs._argv("cpm-submit", (job, "--dry-run"))
    done = subprocess.run(argv, env=runs.environment, cwd=runs.jobs, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")
