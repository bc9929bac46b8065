"""The short runs that a calibration is made from."""

from __future__ import annotations

import pytest

from cpm_cluster.calibration.trials import FEWEST_STEPS, MOST_STEPS, SECONDS, NoTrial, trials
from cpm_cluster.planner.answer import judge
from cpm_cluster.planner.job_setup import job_setup
from cpm_cluster.specs.catalogue import default_catalogue, packaged_jobs
from cpm_cluster.specs.checks import is_possible
from cpm_cluster.specs.compose import load_job

COMMANDS = {"infer_100b", "infer_10b", *(f"{script}_cpm9g_command" for script in ("pretrain", "sft", "lora"))}
JOBS = sorted({path.stem for path in packaged_jobs().glob("*.yaml")} - COMMANDS)


@pytest.fixture
def packaged(tmp_path):
    def load(job, *overrides):
        return load_job(packaged_jobs() / f"{job}.yaml", overrides, default_catalogue(tmp_path, tmp_path), "slurm")

    return load


@pytest.mark.parametrize("job", JOBS)
def test_of_every_packaged_training_are_possible_and_fit_on_one_node(packaged, job):
    spec = packaged(job)
    found = trials(spec, judge)
    assert len(found) == 3
    for trial in found:
        assert is_possible(trial.spec)
        assert judge(trial.spec).verdict == "fits"
        assert trial.spec.resources.nodes == 1
        assert (trial.spec.image, trial.spec.engine, trial.spec.method) == (spec.image, spec.engine, spec.method)
        assert trial.spec.init_from is None and "builtin:" in str(trial.spec.data)


@pytest.mark.parametrize("job", JOBS)
def test_differ_in_what_tells_weights_activations_and_constants_apart(packaged, job):
    setups = [job_setup(trial.spec) for trial in trials(packaged(job), judge)]
    assert len({setup.shape.layers for setup in setups}) == 2
    assert len({setup.micro_batch for setup in setups}) == 2
    assert {setup.shape.hidden for setup in setups} == {job_setup(packaged(job)).shape.hidden}


def test_begin_with_no_adapter_of_the_real_model(packaged):
    job = packaged("lora_10b", "method.lora.init_from=/CPM-9G/adapter")
    assert {trial.spec.method.init_from for trial in trials(job, judge)} == {None}


def test_take_about_two_minutes_together(packaged):
    for trial in trials(packaged("full_10b"), judge):
        planned = judge(trial.spec).time
        assert FEWEST_STEPS <= planned.steps <= MOST_STEPS
        assert planned.seconds == pytest.approx(SECONDS, rel=0.1)


def test_take_smaller_batches_where_the_jobs_own_do_not_fit(packaged):
    found = trials(packaged("full_10b", "training.micro_batch=512"), judge)
    assert max(trial.spec.training.micro_batch for trial in found) < 512


@pytest.mark.parametrize(
    ("job", "overrides", "why"),
    [
        ("infer_10b", (), "engine command"),
        ("full_10b", ("cluster=sandbox", "runtime=podman", "engine=torch", "training.attention=auto"), "pretended"),
        ("lora_10b", ("cluster=slurm", "resources.memory_per_node=5G"), "type of GPU is not known"),
        ("lora_10b", ("resources.memory_per_node=5G",), "not even a few layers"),
    ],
)
def test_are_refused_with_the_reason(packaged, job, overrides, why):
    with pytest.raises(NoTrial, match=why):
        trials(packaged(job, *overrides), judge)
