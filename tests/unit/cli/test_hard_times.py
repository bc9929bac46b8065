"""What the command line does where the machine, a file or a reader lets it down: a sentence, and the exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cpm_cluster.cli import exit_codes
from cpm_cluster.cli.main import main, submit_main

ROOT = Path(__file__).resolve().parents[3]
QUICKSTART = str(ROOT / "jobs" / "quickstart.yaml")
PROGRAM = [sys.executable, "-c", "from cpm_cluster.cli.main import main; main()"]


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("CPM_RUNS_DIR", raising=False)


def output_of(capsys, *words, program=main):
    with pytest.raises(SystemExit) as ended:
        program(list(words))
    said = capsys.readouterr()
    return ended.value.code, said.out, said.err


@pytest.mark.parametrize("verb", ["submit", "plan", "calibrate"])
@pytest.mark.parametrize("name", ["", ".", "..", "/"])
def test_a_folder_is_no_job(capsys, verb, name):
    code, out, err = output_of(capsys, verb, name)
    assert (code, out) == (exit_codes.BAD_INPUT, "")
    assert err.startswith("error: ") and "Is a directory" in err


@pytest.mark.parametrize("verb", ["submit", "plan", "calibrate", "shell"])
@pytest.mark.timeout(30)
def test_a_pipe_that_nobody_writes_to_is_not_waited_for(capsys, verb):
    os.mkfifo("pipe.yaml")
    code, out, err = output_of(capsys, verb, "pipe.yaml")
    assert (code, out) == (exit_codes.BAD_INPUT, "")
    assert err == "error: pipe.yaml: is a pipe or a device; save it as a file\n"


def test_a_shell_for_the_profile_that_an_unset_variable_names(capsys):
    code, _, err = output_of(capsys, "shell", "")
    assert code == exit_codes.BAD_INPUT and err.startswith("error: the name of the profile is empty")


@pytest.mark.parametrize("verb", ["status", "logs", "cancel", "resume"])
def test_a_name_that_no_file_can_have_is_no_run(capsys, verb):
    code, _, err = output_of(capsys, verb, "x" * 300)
    assert code == exit_codes.BAD_INPUT and "there are no runs in runs" in err


@pytest.mark.parametrize(
    "words", [["--help"], ["plan", QUICKSTART], ["plan", QUICKSTART, "--json"], ["submit", QUICKSTART, "--dry-run"]]
)
def test_a_reader_that_has_seen_enough_is_no_failure(words):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*PROGRAM, *words], stdout=writer, stderr=subprocess.PIPE, text=True, check=False, timeout=60)
    os.close(writer)
    assert (done.returncode, done.stderr) == (exit_codes.OK, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("words", [["schema", "job"], ["plan", QUICKSTART, "--json"]])
def test_an_output_that_is_full_is_said_on_stderr(words):
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = subprocess.run(
            [*PROGRAM, *words], stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=60
        )
    assert (done.returncode, done.stderr) == (exit_codes.UNAVAILABLE, "error: No space left on device\n")


def test_a_user_without_a_home(capsys, monkeypatch):
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as where HOME is not set, and no account says it
    code, _, err = output_of(capsys, "plan", QUICKSTART)
    assert code == exit_codes.UNAVAILABLE and "HOME is not set" in err and "set HOME" in err


def test_a_folder_that_is_gone_under_ones_feet(capsys, monkeypatch, tmp_path):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    code, _, err = output_of(capsys, "plan", QUICKSTART)
    monkeypatch.chdir(tmp_path)
    assert code == exit_codes.UNAVAILABLE
    assert err == "error: the folder that you are in has been removed; cd to one that is there\n"


def test_a_defect_where_not_even_a_report_can_be_kept(capsys, monkeypatch):
    import cpm_cluster.cli.runs

    def broken(*arguments):
        raise AssertionError("impossible")

    monkeypatch.setattr(cpm_cluster.cli.runs, "all_runs", broken)
    monkeypatch.setattr("tempfile.tempdir", "/nowhere")
    code, _, err = output_of(capsys, "runs")
    assert code == exit_codes.FAILED
    assert err.startswith("error: this is a defect of cpm-cluster (AssertionError); please report this")


def test_what_a_user_typed_does_not_drive_the_terminal(capsys):
    (Path("runs") / "x-20260102-030405-0001").mkdir(parents=True)
    code, _, err = output_of(capsys, "status", "\x1b[2J")
    assert code == exit_codes.BAD_INPUT and "\x1b" not in err and r"\x1b[2J is no run" in err


def test_runs_of_which_none_can_be_read_are_not_none(capsys):
    (Path("runs") / "x-20260102-030405-0001").mkdir(parents=True)
    code, out, err = output_of(capsys, "runs")
    assert (code, out) == (exit_codes.OK, "")
    assert err == "none of the 1 runs in runs can be read; cpm status x-20260102-030405-0001 says why\n"


def test_a_job_that_does_not_fit_says_so_in_json(capsys):
    words = (str(ROOT / "jobs" / "full_100b.yaml"), "--set", "profile=lora-100b-8x80g", "--json")
    code, out, _ = output_of(capsys, *words, program=submit_main)
    found = json.loads(out)
    assert code == exit_codes.DOES_NOT_FIT
    assert found["error"] and found["verdict"] == "does not fit" and found["advice"]


@pytest.mark.parametrize("verb", ["up", "down", "status"])
def test_every_verb_of_the_sandbox_has_an_example(capsys, verb):
    code, text, _ = output_of(capsys, "sandbox", verb, "--help")
    assert code == exit_codes.OK and "Examples:" in text and text.count(f"cpm sandbox {verb}") >= 2
