"""A rehearsal keeps what Slurm and the container see, and shrinks what needs memory."""

from __future__ import annotations

from dataclasses import replace

from launch_jobs import packaged

from cpm_cluster.launch.rehearsal import overrides, rehearse

RUN_DIR = "/shared/runs/r"


def rehearsed(job, stage="slurm", missing=frozenset()):
    return rehearse(job, job, stage, RUN_DIR, missing)


def test_nodes_ranks_image_mounts_and_environment_stay():
    job = packaged("full_100b").spec
    spec = rehearsed(job).spec
    for kept in (
        "resources",
        "cluster",
        "image",
        "runtime",
        "engine",
        "mounts",
        "env",
        "slurm",
        "container",
        "secrets",
    ):
        assert getattr(spec, kept) == getattr(job, kept), kept


def test_model_data_and_steps_are_small():
    spec = rehearsed(packaged("full_100b").spec).spec
    assert spec.model.parameters < 1_000_000
    assert [source.path for source in spec.data.train] == ["builtin:python-reference"] and spec.init_from is None
    assert spec.training.steps == 24
    assert spec.training.checkpoint.every < spec.training.steps / 2  # a stop, and something to go on with
    assert spec.time_limit_s == 1800
    assert spec.name == "cpm-9g-100b-full-rehearsal"


def test_lora_stays_lora():
    job = packaged("lora_100b").spec
    spec = rehearsed(job).spec
    assert spec.method.targets == job.method.targets
    assert spec.method.rank == 4


def test_an_adapter_to_begin_with_is_of_the_real_model():
    job = packaged("lora_100b", "method.lora.init_from=/CPM-9G/adapter").spec
    assert job.method.init_from == "/CPM-9G/adapter"
    assert rehearsed(job).spec.method.init_from is None


def test_a_program_of_the_users_own_is_not_touched():
    job = packaged("sft_cpm9g_command").spec
    assert rehearsed(job).spec.command == job.command


def test_on_the_sandbox_several_nodes_need_podman():
    assert "runtime=podman" in overrides(packaged("full_100b").spec, "sandbox")
    assert "runtime=docker-rootless" in overrides(packaged("lora_100b").spec, "sandbox")


def test_on_a_real_cluster_nothing_is_overridden():
    assert overrides(packaged("full_100b").spec, "slurm") == ()


def test_what_a_stage_cannot_prove_is_said():
    job = packaged("full_100b").spec
    staged = replace(job, runtime="podman", engine="torch")
    text = " ".join(rehearse(job, staged, "sandbox", RUN_DIR, {"/data/public/CPM-9G"}).unproven)
    for expected in ("fits into memory", "NCCL", "bmtrain", "the runtime docker: podman", "/data/public/CPM-9G"):
        assert expected in text
    assert "no cluster here" in " ".join(rehearsed(job, "local").unproven)


def test_an_empty_folder_takes_the_place_of_a_mount_that_is_not_there():
    job = packaged("full_100b").spec
    (path,) = job.mounts
    spec = rehearsed(job, "sandbox", {path}).spec
    assert spec.mounts == {f"{RUN_DIR}/mounts/0": job.mounts[path]}
