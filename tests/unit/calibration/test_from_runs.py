"""From the records of runs to the file that later plans use."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from cpm_cluster.calibration.from_runs import calibrate_runs, calibration_for
from cpm_cluster.calibration.planned import planned_beside_measured, planned_record, recorded_setup
from cpm_cluster.planner import cpu
from cpm_cluster.planner.answer import answer
from cpm_cluster.planner.calibrate import CalibrationError
from cpm_cluster.planner.gpu_memory import gpu_memory
from cpm_cluster.planner.job_setup import CPU, job_setup
from cpm_cluster.planner.memory_constants import MIB
from cpm_cluster.planner.step_time import step_time
from cpm_cluster.specs.catalogue import default_catalogue, packaged_jobs
from cpm_cluster.specs.compose import load_job


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "calibration"


@pytest.fixture
def packaged(tmp_path):
    def load(job, *overrides):
        return load_job(packaged_jobs() / f"{job}.yaml", overrides, default_catalogue(tmp_path, tmp_path), "slurm")

    return load


@pytest.fixture
def spec(packaged):
    return packaged("full_10b")


@pytest.fixture
def ended_run(made_run):
    """A run of a job that needed so many times what was planned, at such a part of the speed."""

    def make(run_id, spec, memory=1.0, slowness=1.0):
        record = planned_record(spec, answer(spec))
        setup = recorded_setup(record)
        run = made_run(run_id).submitted().phase("training").exited(0)
        run.file("fit.json", json.dumps(record))
        if setup.gpu == CPU:
            step, used = cpu.step_time(setup), cpu.host_memory(setup).binding.bytes
            peaks = {"rss_bytes": round(memory * used)}
        else:
            step, used = step_time(setup), gpu_memory(setup).binding.bytes / MIB
            gpus = {"a": {"used_mib": round(memory * used), "total_mib": 81_251}}
            peaks = {"gpus": gpus, "rss_bytes": 50 * 10**9}
        run.file("telemetry/n1.jsonl", json.dumps({"kind": "sample", "time": 1.0, "peaks": peaks}) + "\n")
        records = [{"step": i, "time": i * step.seconds * slowness, "tokens_seen": i * step.tokens} for i in range(12)]
        run.file("metrics.jsonl", "\n".join(map(json.dumps, records)) + "\n")
        return run.run

    return make


def test_a_later_plan_finds_the_calibration_of_its_image_gpu_and_engine(ended_run, spec, folder):
    run = ended_run("job-20260102-030405-0001", spec, memory=1.1, slowness=1.5)
    made = calibrate_runs([run], folder)
    assert made.path.parent == folder and made.refused == ()
    assert 1.1 < made.calibration.step_time.multipliers[0] < 1.6
    found = calibration_for(spec, folder)
    assert found.runs == (run.id,)
    assert answer(spec, found).notes[0] == found.note
    assert calibration_for(replace(spec, image=None), folder) is None


def test_fewer_than_three_runs_say_that_they_may_make_other_plans_worse(ended_run, spec, folder):
    runs = [ended_run(f"job-20260102-030405-000{i}", spec) for i in range(3)]
    assert "may make plans of other configurations worse" in calibrate_runs(runs[:2], folder).calibration.note
    assert "worse" not in calibrate_runs(runs, folder).calibration.note


def test_runs_without_gpus_calibrate_host_memory_and_speed_of_jobs_without_gpus(ended_run, packaged, folder):
    job = packaged("quickstart")
    assert answer(job).time is None
    runs = [
        ended_run(f"job-20260102-030405-000{i}", packaged("quickstart", change), memory=1.2, slowness=3.0)
        for i, change in enumerate(("training.micro_batch=2", "training.micro_batch=4", "model.layers=2"))
    ]
    made = calibrate_runs(runs, folder)
    assert made.calibration.subject.gpu == CPU
    assert made.calibration.gpu_memory is None
    found = answer(job, calibration_for(job, folder))
    assert found.time.step.seconds == pytest.approx(3 * cpu.step_time(job_setup(job)).seconds, rel=0.1)
    assert found.time.low_s < found.time.seconds < found.time.high_s
    planned, scaled = (fit.demands[0] for fit in (answer(job), found))
    assert scaled.bytes == pytest.approx(1.2 * planned.bytes, rel=0.05)
    assert answer(packaged("full_10b"), calibration_for(packaged("full_10b"), folder)).notes[0].startswith("not calib")


def test_runs_that_cannot_be_used_are_named(ended_run, made_run, spec, folder):
    good = ended_run("job-20260102-030405-0001", spec)
    failed = made_run("job-20260102-030405-0002").submitted().exited(1).run
    bare = made_run("job-20260102-030405-0003").submitted().exited(0).run
    alien = ended_run("job-20260102-030405-0004", spec, memory=0.1)
    refused = "\n".join(map(str, calibrate_runs([good, failed, bare, alien], folder).refused))
    assert f"{failed.id}: is failed" in refused
    assert f"{bare.id}: fit.json keeps no setup" in refused
    assert f"{alien.id}: its GPU memory is" in refused


def test_without_a_usable_run_nothing_is_written(made_run, folder):
    run = made_run("job-20260102-030405-0002").submitted().exited(1).run
    with pytest.raises(CalibrationError, match=f"{run.id}: is failed"):
        calibrate_runs([run], folder)
    assert not folder.exists()


@pytest.mark.parametrize("there", [("cluster=sandbox", "image=null", "runtime=bare", "engine=torch")])
def test_pretended_gpus_and_programs_of_their_own_keep_no_setup(packaged, there):
    pretended = packaged("full_10b", *there, "training.attention=auto")
    for job in (pretended, packaged("sft_cpm9g_command")):
        assert recorded_setup(planned_record(job, answer(job))) is None


def test_a_setup_is_read_back_as_it_was_recorded(spec):
    record = json.loads(json.dumps(planned_record(spec, answer(spec))))
    assert recorded_setup(record) == job_setup(spec)
    with pytest.raises((TypeError, KeyError)):
        recorded_setup({"setup": {**record["setup"], "of_tomorrow": 1}})


def test_planned_is_shown_beside_measured(ended_run, spec):
    gpu, host = planned_beside_measured(ended_run("job-20260102-030405-0001", spec, memory=1.1))
    assert (gpu.resource, host.resource) == ("GPU memory", "host memory")
    assert gpu.low < gpu.planned < gpu.high
    assert gpu.used == pytest.approx(1.1 * gpu_memory(job_setup(spec)).binding.bytes, rel=1e-3)
    assert asdict(host)["used"] == 50 * 10**9
