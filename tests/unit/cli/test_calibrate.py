"""`cpm plan --calibrate`: from the records of runs to the file that later plans use."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace

import pytest

from cpm_cluster.cli.calibrate import calibrate_runs, calibration_for, folder, planned_beside_measured
from cpm_cluster.planner.answer import answer
from cpm_cluster.planner.calibrate import CalibrationError
from cpm_cluster.planner.gpu_memory import gpu_memory
from cpm_cluster.planner.job_setup import job_setup
from cpm_cluster.planner.memory_constants import MIB
from cpm_cluster.planner.step_time import step_time
from cpm_cluster.specs.catalogue import default_catalogue, packaged_jobs
from cpm_cluster.specs.compose import load_job


@pytest.fixture(autouse=True)
def _own_config(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


@pytest.fixture
def spec(tmp_path):
    return load_job(packaged_jobs() / "full_10b.yaml", (), default_catalogue(tmp_path, tmp_path), "slurm")


@pytest.fixture
def ended_run(made_run, spec):
    """A run that needed so many times what was planned, at such a part of the speed."""

    def make(run_id, memory=1.0, slowness=1.0, **change):
        setup = replace(job_setup(spec), **change)
        run = made_run(run_id).submitted().phase("training").exited(0)
        plan = {"image": spec.image.tag, "setup": asdict(setup), **asdict(answer(spec))}
        run.file("fit.json", json.dumps(plan))
        used = memory * gpu_memory(setup).binding.bytes / MIB
        peaks = {"gpus": {"a": {"used_mib": round(used), "total_mib": 81_251}}, "rss_bytes": 50 * 10**9}
        run.file("telemetry/n1.jsonl", json.dumps({"kind": "sample", "time": 1.0, "peaks": peaks}) + "\n")
        step = step_time(setup)
        records = [
            json.dumps({"step": i, "time": i * step.seconds * slowness, "tokens_seen": i * step.tokens})
            for i in range(12)
        ]
        run.file("metrics.jsonl", "\n".join(records) + "\n")
        return run.run

    return make


def test_a_later_plan_finds_the_calibration_of_its_image_gpu_and_engine(ended_run, spec):
    run = ended_run("job-20260102-030405-0001", memory=1.1, slowness=1.5)
    lines = list(calibrate_runs((run.id,), run.files.root.parent))
    assert lines[0].startswith("calibrated on 1 run (full) of bmtrain on a100-80g")
    assert re.search(r"speed +compute × 1\.[1-5]", "\n".join(lines))
    assert lines[-1] == f"written to {folder()}/{next(folder().iterdir()).name}"
    found = calibration_for(spec)
    assert found is not None
    assert found.runs == (run.id,)
    assert calibration_for(replace(spec, image=None)) is None


def test_runs_that_cannot_be_used_are_named(ended_run, made_run):
    good = ended_run("job-20260102-030405-0001")
    failed = made_run("job-20260102-030405-0002").submitted().exited(1).run
    bare = made_run("job-20260102-030405-0003").submitted().exited(0).run
    alien = ended_run("job-20260102-030405-0004", memory=0.1)
    lines = "\n".join(calibrate_runs((good.id, failed.id, bare.id, alien.id), good.files.root.parent))
    assert f"left out: {failed.id}: is failed" in lines
    assert f"left out: {bare.id}: fit.json keeps no setup" in lines
    assert f"left out: {alien.id}: its GPU memory is" in lines


def test_without_a_usable_run_nothing_is_written(made_run):
    run = made_run("job-20260102-030405-0002").submitted().exited(1).run
    with pytest.raises(CalibrationError, match=f"{run.id}: is failed"):
        list(calibrate_runs((run.id,), run.files.root.parent))
    assert not folder().exists()


def test_planned_is_shown_beside_measured(ended_run):
    lines = list(planned_beside_measured(ended_run("job-20260102-030405-0001")))
    assert [line.partition(":")[0] for line in lines] == ["GPU memory", "host memory"]
    assert re.fullmatch(r"GPU memory: planned .+ \(.+ to .+\), used .+ \([+-]\d+%\)", lines[0])
