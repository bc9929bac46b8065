"""cpm calibrate: three runs one after the other, and what they come to. The scheduler and its machine are fakes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from made_runs import MadeRun

from cpm_cluster.calibration.planned import recorded_setup
from cpm_cluster.cli import exit_codes
from cpm_cluster.cli.main import main
from cpm_cluster.planner import cpu
from cpm_cluster.runs.measured import predicted
from cpm_cluster.runs.run import Run, Submission
from cpm_cluster.schedulers import local


class Records(MadeRun):
    """Those of a run that is there already."""

    def __init__(self, run: Run) -> None:
        self.run = run


class FakeScheduler:
    """Runs end as soon as they are submitted, with the exit codes in `codes`, at a third of the usual speed."""

    codes: list[int] = []

    def require(self, plan) -> str:
        return ""

    def submit(self, run: Run) -> Submission:
        setup = recorded_setup(predicted(run) or {})
        assert setup is not None
        step, host = cpu.step_time(setup), cpu.host_memory(setup).binding.bytes
        peaks = {"kind": "sample", "time": 1.0, "peaks": {"rss_bytes": host}}
        rows = [{"step": i, "time": 3 * i * step.seconds, "tokens_seen": i * step.tokens} for i in range(12)]
        records = Records(run).submitted().phase("training").exited(self.codes.pop(0))
        records.file("telemetry/n1.jsonl", json.dumps(peaks) + "\n")
        records.file("metrics.jsonl", "\n".join(map(json.dumps, rows)) + "\n")
        return Submission("local", "1", "here")

    def is_alive(self, run: Run, submission: Submission) -> bool:
        return False


@pytest.fixture
def calibrate(capsys, monkeypatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr(local, "Scheduler", FakeScheduler)
    (tmp_path / "mine.yaml").write_text(
        "name: mine\nmodel: cpm-tiny\ncluster: local\nprofile: cpu-2\nengine: torch\ndata: {train: /none/rows.jsonl}\n"
        "training: {seq_len: 256, precision: fp32, zero_stage: 0}\n",
        "utf-8",
    )

    def run(*codes: int, options: tuple[str, ...] = ()) -> tuple[int, str, str]:
        monkeypatch.setattr(FakeScheduler, "codes", list(codes))
        with pytest.raises(SystemExit) as ended:
            main(["calibrate", "mine.yaml", *options])
        said = capsys.readouterr()
        return ended.value.code, said.out, said.err

    return run


def test_three_runs_come_to_a_calibration_that_the_next_plan_uses(calibrate, capsys, tmp_path: Path) -> None:
    code, text, _ = calibrate(0, 0, 0)
    assert code == exit_codes.OK
    assert re.findall(r"^run (\d) of 3: (\d) of 4 layers, micro batch (\d)", text, re.M) == [
        ("1", "2", "1"),
        ("2", "4", "1"),
        ("3", "2", "2"),
    ]
    assert re.search(r"^calibrated on 3 runs \(full\) of ddp on cpu, no image, .*: host memory .*, speed", text, re.M)
    assert re.search(r"^speed +compute × 2\.9\d, .*3 run\(s\), residual 0\.\d%$", text, re.M)
    assert "there was no GPU: this holds for jobs on CPUs alone" in text
    assert f"written to {tmp_path}/config/cpm-cluster/calibration/no-image-cpu-ddp.yaml" in text
    with pytest.raises(SystemExit):
        main(["plan", "mine.yaml"])
    assert re.search(r"^step .* × 1,000 steps; [\d,]+ tokens/s a rank", capsys.readouterr().out, re.M)


def test_a_run_that_fails_is_left_out_and_said_to_be_missed(calibrate) -> None:
    code, text, _ = calibrate(0, 1, 0)
    assert code == exit_codes.OK
    assert re.search(r"^left out: mine-calibration-\S+: is failed", text, re.M)
    assert "so few may make plans of other configurations worse" in text
    assert "three runs or more" in text


def test_where_all_fail_nothing_is_calibrated(calibrate, tmp_path: Path) -> None:
    code, text, errors = calibrate(1, 1, 1)
    assert code == exit_codes.FAILED
    assert "nothing was calibrated" in errors and text.count("says why") == 3
    assert not (tmp_path / "config").exists()


def test_json_has_the_trials_and_what_they_came_to(calibrate, tmp_path: Path) -> None:
    code, text, told = calibrate(0, 1, 0, options=("--json",))
    found = json.loads(text)
    assert code == exit_codes.OK
    assert [(trial["state"], trial["what"][:15]) for trial in found["trials"]] == [
        ("finished", "2 of 4 layers, "),
        ("failed", "4 of 4 layers, "),
        ("finished", "2 of 4 layers, "),
    ]
    assert all(trial["steps"] > 0 and Path(trial["run_dir"]).name == trial["run"] for trial in found["trials"])
    calibration = found["calibration"]
    assert calibration["subject"] == {"image": "", "gpu": "cpu", "engine": "ddp"}
    assert calibration["runs"] == [trial["run"] for trial in found["trials"] if trial["state"] == "finished"]
    assert calibration["gpu_memory"] is None
    assert calibration["step_time"]["multipliers"]["compute"] == pytest.approx(2.9, abs=0.1)
    assert found["enough"] is False
    assert [(left["run"], left["why"][:9]) for left in found["refused"]] == [(found["trials"][1]["run"], "is failed")]
    assert found["path"] == f"{tmp_path}/config/cpm-cluster/calibration/no-image-cpu-ddp.yaml"
    assert "run 2 of 3" in told  # beside the data, for whoever waits


def test_json_of_a_dry_run_has_the_trials_alone(calibrate, tmp_path: Path) -> None:
    code, text, _ = calibrate(options=("--json", "--dry-run"))
    trials = json.loads(text)["trials"]
    assert code == exit_codes.OK and [set(trial) for trial in trials] == [{"what", "steps"}] * 3
    assert not (tmp_path / "runs").exists()


def test_json_of_a_failure_says_why_beside_the_trials(calibrate) -> None:
    code, text, _ = calibrate(1, 1, 1, options=("--json",))
    found = json.loads(text)
    assert code == exit_codes.FAILED
    assert found["error"].startswith("nothing was calibrated:")
    assert [trial["state"] for trial in found["trials"]] == ["failed"] * 3


def test_runs_that_are_there_give_the_same_json(calibrate, capsys) -> None:
    _, text, _ = calibrate(0, 0, 0, options=("--json",))
    made = json.loads(text)
    for words in (["--json", *made["calibration"]["runs"]], [*made["calibration"]["runs"], "--json"]):
        with pytest.raises(SystemExit):
            main(["plan", "--calibrate", *words])
        assert json.loads(capsys.readouterr().out) == {key: made[key] for key in made if key != "trials"}
