"""What the command line says of itself."""

from __future__ import annotations

import re

import pytest

from cpm_cluster.cli import exit_codes, main
from cpm_cluster.cli.main import VERBS


def output_of(capsys, *words, program=main.main):
    """Run the program in this process: its exit code, stdout and stderr."""
    with pytest.raises(SystemExit) as ended:
        program(list(words))
    captured = capsys.readouterr()
    return ended.value.code, captured.out, captured.err


@pytest.mark.parametrize("words", [["--help"], ["-h"], []])
def test_help_lists_all_verbs_examples_and_exit_codes(capsys, words):
    code, text, _ = output_of(capsys, *words)
    assert code == 0
    for verb, what in VERBS.items():
        assert re.search(rf"^  {verb} +{re.escape(what)}$", text, re.MULTILINE)
    assert "cpm submit jobs/quickstart.yaml" in text and "Exit codes:" in text


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_with_an_example(capsys, verb):
    code, text, _ = output_of(capsys, verb, "--help")
    assert code == 0
    assert text == output_of(capsys, verb, "-h")[1]
    assert re.search(rf"^ +(sudo )?(cpm {verb}|cpm-submit)\b", text, re.MULTILINE)
    assert max(map(len, text.splitlines())) <= 110


@pytest.mark.parametrize("verb", ["status", "cancel", "resume", "runs", "export"])
def test_every_verb_on_runs_speaks_json_and_finds_them_elsewhere(capsys, verb):
    text = output_of(capsys, verb, "--help")[1]
    assert "--json" in text and "--runs-dir" in text and "CPM_RUNS_DIR" in text


def test_every_exit_code_is_documented():
    codes = {value for name, value in vars(exit_codes).items() if name.isupper() and isinstance(value, int)}
    documented = {int(number) for number in re.findall(r"\b(\d+) ", exit_codes.MEANINGS)}
    assert codes == documented


def test_cpm_submit_is_cpm_submit(capsys):
    _, text, _ = output_of(capsys, "--help", program=main.submit_main)
    assert "Exit codes:" in text and "--dry-run" in text
    assert text.splitlines()[2:] == output_of(capsys, "submit", "--help")[1].splitlines()[2:]


def test_the_version(capsys):
    assert re.fullmatch(r"cpm, version \d+\.\d+\.\d+\n", output_of(capsys, "--version")[1])


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["statsu"], '"statsu" is no verb (did you mean status?)'),
        (["frobnicate"], '"frobnicate" is no verb'),
        (["my.yaml"], "to run that job: cpm submit my.yaml"),
        (["\x1b[31m"], '"\\x1b[31m" is no verb'),
        (["status", "--frob"], "--frob"),
        (["logs", "--rank", "-1"], "--rank"),
        (["runs", "--limit", "many"], "--limit"),
        (["schema", "jobs"], "job"),
        (["schema"], "Choose from: job, profile, "),
        (["submit"], "JOB"),
        (["submit", "a.yaml", "b.yaml"], "b.yaml"),
    ],
)
def test_a_wrong_command_line_is_one_message_with_a_way_to_help(capsys, words, hint):
    code, out, err = output_of(capsys, *words)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and hint in err and "--help shows what there is" in err
    assert len(err.splitlines()) == 2


def test_a_wrong_command_line_in_json(capsys):
    code, out, err = output_of(capsys, "status", "--json", "--frob")
    assert (code, err) == (2, "") and '"error"' in out


def test_a_defect_of_ours_is_no_traceback_but_a_file_to_report(capsys, monkeypatch, tmp_path):
    import cpm_cluster.cli.runs

    def broken(*arguments):
        raise AssertionError("impossible")

    monkeypatch.setattr(cpm_cluster.cli.runs, "all_runs", broken)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code, _, err = output_of(capsys, "runs")
    assert code == 1
    (report,) = tmp_path.iterdir()
    assert err == f"error: this is a defect of cpm-cluster (AssertionError); please report {report}\n"
    assert "impossible" in report.read_text()


def test_a_full_disk_is_a_sentence(capsys, monkeypatch):
    import cpm_cluster.cli.runs

    def full(*arguments):
        raise OSError(28, "No space left on device", "/data/runs/x")

    monkeypatch.setattr(cpm_cluster.cli.runs, "all_runs", full)
    assert output_of(capsys, "runs") == (3, "", "error: /data/runs/x: No space left on device\n")
    assert '"error": "/data/runs/x: No space left on device"' in output_of(capsys, "runs", "--json")[1]
