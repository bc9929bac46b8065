"""Composition: job ← profile ← cluster defaults ← --set, who set what, and where names and paths lead."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from cpm_cluster.specs.catalogue import Catalogue, default_catalogue, packaged_configs
from cpm_cluster.specs.compose import load_job
from cpm_cluster.specs.image import Archive

GPU_JOB = """\
name: demo
cluster: nine-g
profile: full-64x80g
model: cpm-100b
image: cpmlive-flash:0.0.4
engine: bmtrain
data: {train: rows.jsonl}
training: {precision: fp16}
"""

JOB_WITH_IMAGE = """\
name: demo
engine: command
command: [true]
resources: {gpus_per_node: 0, memory_per_node: 1G}
image: cpmlive-flash:0.0.4
"""


def who_set(spec, key):
    origin = spec.origins[key]
    return f"{origin.set_by} {origin.where}"


# precedence and origins


def test_a_job_takes_what_it_leaves_out_from_its_profile_and_its_cluster(load):
    spec = load(GPU_JOB)

    assert (spec.resources.nodes, spec.resources.gpus_per_node) == (8, 8)
    assert spec.time_limit_s == 48 * 3600  # of the profile, not the cluster's 24 h
    assert spec.signal_lead_s == 600
    assert spec.slurm.partition == "gpu1"
    assert spec.cluster.driver == "470.57.02"
    assert spec.gpu.product == "NVIDIA A100 80 GB"
    assert (spec.cluster_name, spec.model_name, spec.image.tag) == ("nine-g", "cpm-100b", "cpmlive-flash:0.0.4")


def test_a_job_without_a_time_limit_takes_that_of_the_cluster(load):
    assert load(GPU_JOB.replace("full-64x80g", "lora-8x80g")).time_limit_s == 24 * 3600


def test_the_job_wins_over_its_profile_and_set_over_the_job(load):
    job = GPU_JOB + "time_limit: 12h\nresources: {nodes: 4}\n"

    assert load(job).time_limit_s == 12 * 3600
    assert load(job).resources.nodes == 4
    assert load(job).resources.gpus_per_node == 8  # the profile's, beside the job's nodes
    assert load(job, "time_limit=6h", "resources.nodes=2").time_limit_s == 6 * 3600
    assert load(job, "resources.nodes=2").resources.nodes == 2


def test_every_value_knows_who_set_it_and_in_which_line(load):
    spec = load(GPU_JOB + "resources: {nodes: 4}\n", "training.lr=2e-4")

    assert who_set(spec, "resources.nodes") == "job job.yaml:9:20"
    assert who_set(spec, "resources.gpus_per_node") == "profile configs/profiles/full-64x80g.yaml:4:18"
    assert who_set(spec, "time_limit") == "profile configs/profiles/full-64x80g.yaml:6:13"
    assert who_set(spec, "slurm.partition") == "cluster configs/clusters/nine-g.yaml:9:20"
    assert who_set(spec, "signal_lead") == "cluster configs/clusters/nine-g.yaml:19:14"
    assert who_set(spec, "training.lr") == "--set --set training.lr=2e-4"
    assert str(spec.origins["resources.nodes"]) == "job (job.yaml:9:20)"
    assert "training.steps" not in spec.origins  # a default


def test_the_profile_of_the_command_line_brings_its_own_resources(load):
    assert load(GPU_JOB, "profile=lora-8x80g").resources.nodes == 1


def test_the_detected_cluster_is_used_where_the_job_names_none(load, cpu_job):
    job = cpu_job.replace("cluster: local\n", "")

    for text in (job, job + "cluster:\n"):
        spec = load(text, detected="local")
        assert spec.cluster_name == "local" and spec.cluster.scheduler == "local"
        assert spec.origins["cluster"].set_by == "detected"


def test_a_detected_cluster_that_is_not_known_is_the_problem_of_the_job_file(refused, cpu_job):
    assert refused(cpu_job.replace("cluster: local\n", ""), detected="nine-h") == [
        'job.yaml: cluster: "nine-h" is not in configs/clusters (did you mean nine-g?)'
    ]


def test_a_heading_without_keys_leaves_the_profile_as_it_is(load, cpu_job):
    assert load(cpu_job + "resources:\n").resources.processes_per_node == 2


def test_the_composed_job_cannot_be_changed(load, cpu_job):
    with pytest.raises(dataclasses.FrozenInstanceError):
        load(cpu_job).seed = 3


# --set


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("training.checkpoint.every=50", lambda spec: spec.training.checkpoint.every == 50),
        ("training={steps: 7, lr: 1e-3}", lambda spec: (spec.training.steps, spec.training.lr) == (7, 1e-3)),
        (
            "data.train=[a.jsonl, b.jsonl]",
            lambda spec: [Path(source.path).name for source in spec.data.train] == ["a.jsonl", "b.jsonl"],
        ),
        ("method.lora.rank=64", lambda spec: spec.method.rank == 64),
        ("method=full", lambda spec: spec.method is None),
        ("env.NCCL_DEBUG=INFO", lambda spec: spec.env == {"NCCL_DEBUG": "INFO"}),
        ("description=a=b", lambda spec: spec.description == "a=b"),
        ('description="two: words"', lambda spec: spec.description == "two: words"),
        ("mounts={/data: /corpus:ro}", lambda spec: spec.mounts == {"/data": "/corpus:ro"}),
        ("seed=", lambda spec: spec.seed == 1234),  # back to the default
    ],
)
def test_set_takes_nested_keys_lists_and_mappings(load, cpu_job, option, value):
    assert value(load(cpu_job + "seed: 7\nmethod: lora\n", option))


def test_the_last_set_of_a_key_wins(load, cpu_job):
    assert load(cpu_job, "seed=1", "seed=2").seed == 2


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("seed", "--set seed: is not of the form key.subkey=value"),
        ("=1", "--set =1: is not of the form key.subkey=value"),
        ("a..b=1", "--set a..b=1: is not of the form key.subkey=value"),
        ("a b=1", "--set a b=1: is not of the form key.subkey=value"),
        ("x" + ".x" * 99_999 + "=1", "--set x" + ".x" * 59 + "…: is not of the form key.subkey=value"),
        ("seed=x", '--set seed=x: seed: "x" is not a whole number of 0 or more'),
        ("sed=1", "--set sed=1: sed: is not a known key (did you mean seed?)"),
        ("training.setps=1", "--set training.setps=1: training.setps: is not a known key (did you mean steps?)"),
        ("seed=1\n", None),
        (
            "seed=[1",
            "--set seed=[1: is not valid YAML: a comma is missing here, or the ] of the list that begins in line 1",
        ),
        ("seed=\x00", r"--set seed=\x00: holds the control character U+0000, which YAML does not allow; remove it"),
        ("seed=\udcff", r"--set seed=\udcff: is not UTF-8 text"),  # what Python makes of a byte 0xff
        ("env={A: 1, A: 2}", "--set env={A: 1, A: 2}: env.A: is written twice; keep one"),
        ("training=3", '--set training=3: training: is "3"; write a mapping, {key: value}'),
    ],
)
def test_a_set_that_is_wrong_is_named_as_it_was_typed(load, refused, cpu_job, option, message):
    if message is None:
        assert load(cpu_job, option).seed == 1
    else:
        assert refused(cpu_job, option) == [message]


def test_what_is_wrong_with_the_file_and_the_options_is_said_together(refused, cpu_job):
    assert refused(cpu_job + "sead: 1\n", "training.lr=0", "nonsense") == [
        "--set nonsense: is not of the form key.subkey=value",
        "--set training.lr=0: training.lr: 0 is out of range; write a number above 0 and at most 100",
        "job.yaml:6:1: sead: is not a known key (did you mean seed?)",
    ]


# models, images, GPUs


def test_an_inline_model_over_a_base_changes_what_it_names(load, cpu_job):
    spec = load(cpu_job.replace("model: tiny", "model: {base: tiny, layers: 3}"))

    assert (spec.model.layers, spec.model.hidden, spec.model_name) == (3, 64, "tiny")
    assert who_set(spec, "model.layers") == "job job.yaml:4:29"


def test_a_model_can_stand_whole_in_the_job(load, cpu_job):
    spec = load(cpu_job.replace("tiny", "{layers: 1, hidden: 8, heads: 2, ffn: 16, vocab: 99}"))

    assert (spec.model.vocab, spec.model_name) == (99, "inline")


def test_a_set_changes_one_dimension_of_a_named_model(load, cpu_job):
    assert load(cpu_job, "model.layers=3").model.layers == 3
    assert load(cpu_job, "model.layers=3").model.hidden == 64
    assert load(cpu_job, "model.base=cpm-100b", "model.layers=3").model.hidden == 10240
    assert load(cpu_job.replace("tiny", "{base: tiny, layers: 9}"), "model=tiny").model.layers == 2


def test_an_image_is_found_by_its_tag_and_by_its_file_name(load):
    assert load(GPU_JOB).image == load(GPU_JOB.replace("flash:0", "flash-0")).image


def test_what_is_wrong_with_a_change_is_said_once_and_in_the_job(refused, cpu_job):
    assert refused(cpu_job.replace("tiny", "{base: tiny, layers: 0}")) == [
        "job.yaml:4:29: model.layers: 0 is out of range; write a whole number from 1 to 10000"
    ]


def test_what_is_wrong_with_the_base_is_said_in_the_file_of_the_base(refused, cpu_job, tmp_path):
    (tmp_path / "mine.yaml").write_text("layers: 2\nhidden: x\n")

    assert refused(cpu_job.replace("tiny", "{base: ./mine.yaml, layers: 3}")) == [
        "mine.yaml:1:1: ffn: is missing: width of one feed-forward branch",
        "mine.yaml:1:1: heads: is missing: attention heads",
        "mine.yaml:1:1: vocab: is missing: rows of the embedding",
        'mine.yaml:2:9: hidden: "x" is not a whole number from 1 to 1000000',
    ]


def test_a_base_that_is_not_known_is_said_at_the_base(refused, cpu_job):
    assert refused(cpu_job.replace("tiny", "{base: tinny, layers: 3}")) == [
        'job.yaml:4:15: model.base: "tinny" is not in configs/models (did you mean tiny?)'
    ]


def test_a_cluster_of_cards_that_are_not_known_is_said_in_the_cluster_file(refused, cpu_job, tmp_path):
    (tmp_path / "site.yaml").write_text("scheduler: local\ngpu: a100-80GB\nruntimes: {bare: {}}\n")

    assert refused(cpu_job.replace("cluster: local", "cluster: ./site.yaml")) == [
        'site.yaml:2:6: gpu: "a100-80GB" is not in configs/gpus.yaml (did you mean a100-80g?)'
    ]


# what cannot be read does not make more problems


def test_an_unknown_profile_is_one_problem(refused, cpu_job):
    assert refused(cpu_job.replace("cpu-2", "cpu-3") + "env: {RANK: 1}\n") == [
        'job.yaml:3:10: profile: "cpu-3" is not in configs/profiles (did you mean cpu-2?)',
        "job.yaml:6:13: env.RANK: is set by cpm-cluster, for each rank; remove it",
    ]


@pytest.mark.parametrize(
    "name", ["no such name", "", "[a]", "a/b", "a" * 300, "a" * 5000, "~nobody-of-that-name/x.yaml", '"a\\0b"']
)
@pytest.mark.parametrize("key", ["cluster", "profile", "model", "image"])
def test_a_name_that_leads_nowhere_is_one_problem(refused, load, cpu_job, key, name):
    lines = [line for line in cpu_job.splitlines() if not line.startswith(f"{key}:")]
    job = "\n".join([*lines, f"{key}: {name}"])

    if name == "" and key in ("cluster", "image"):
        assert load(job).name == "demo"
    else:
        messages = refused(job)
        assert len(messages) == 1
        assert f": {'resources' if key == 'profile' and not name else key}: " in messages[0]


# folders and paths


def test_a_file_of_the_user_wins_over_the_packaged_one_of_that_name(load, cpu_job, catalogue, tmp_path):
    mine = tmp_path / "mine"
    (mine / "models").mkdir(parents=True)
    (mine / "models" / "tiny.yaml").write_text("{layers: 5, hidden: 64, heads: 4, ffn: 128, vocab: 512}")
    (mine / "gpus.yaml").write_text(
        (catalogue.folders[0] / "gpus.yaml").read_text().replace("A100 80 GB", "A100 of ours")
    )
    both = Catalogue((mine, *catalogue.folders))

    assert load(cpu_job, catalogue=both).model.layers == 5
    assert load(cpu_job, catalogue=Catalogue((*catalogue.folders, mine))).model.layers == 2
    assert load(GPU_JOB, catalogue=both).gpu.product == "NVIDIA A100 of ours"
    assert both.names("models") == ["cpm-100b", "glm-10b", "tiny"]


def test_configs_are_looked_up_in_the_working_folder_the_home_and_the_package(tmp_path):
    catalogue = default_catalogue(tmp_path / "work", tmp_path / "home")

    assert catalogue.folders == (tmp_path / "work/configs", tmp_path / "home/cpm-cluster", packaged_configs())


def test_relative_paths_start_at_the_job_file(load, cpu_job, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    job = cpu_job.replace("rows.jsonl", "[rows.jsonl, /abs/x.jsonl, ~/y.jsonl, builtin:python-reference]")
    job += "method: {lora: {init_from: runs/tuned}}\n"
    spec = load(job + "code: src\ninit_from: ../w.pt\ntokenizer: vocab.txt\nmounts: {~/data: /data, /a.b/c: /c:ro}\n")

    rows = (f"{tmp_path}/rows.jsonl", "/abs/x.jsonl", "/home/ada/y.jsonl", "builtin:python-reference")
    assert tuple(source.path for source in spec.data.train) == rows
    assert spec.code == f"{tmp_path}/src"
    assert spec.init_from == f"{tmp_path}/../w.pt"
    assert spec.method.init_from == f"{tmp_path}/runs/tuned"
    assert spec.tokenizer == f"{tmp_path}/vocab.txt"
    assert spec.mounts == {"/home/ada/data": "/data", "/a.b/c": "/c:ro"}
    assert spec.origins["mounts./home/ada/data"].set_by == "job"


def test_config_files_given_by_path_start_at_the_job_file_too(load, cpu_job, catalogue, tmp_path, monkeypatch):
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles/mine.yaml").write_text("description: mine\nresources: {gpus_per_node: 0}\n")
    load(cpu_job)  # writes job.yaml
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    spec = load_job(Path("../job.yaml"), ["profile=./profiles/mine.yaml"], catalogue, "local")

    assert spec.resources.processes_per_node is None
    assert who_set(spec, "resources.gpus_per_node") == "profile ../profiles/mine.yaml:2:28"


def test_a_tokenizer_is_found_by_name(load, cpu_job, catalogue):
    assert load(cpu_job + "tokenizer: nine-g\n").tokenizer == str(catalogue.folders[0] / "tokenizers/nine-g.txt")
    assert load(cpu_job + "tokenizer: bytes\n").tokenizer == "bytes"


@pytest.mark.parametrize("path", ["tokenizer.json", "./folder", "llama/tokenizer.json"])
def test_a_tokenizer_of_hugging_face_is_a_file_or_a_folder(load, cpu_job, tmp_path, path):
    assert load(cpu_job + f"tokenizer: {path}\n").tokenizer == str(tmp_path / path)


def test_the_warning_of_a_profile_reaches_the_job(load):
    job = GPU_JOB.replace("full-64x80g", "minimal-1x80g")

    assert load(job).warnings[0] == "Slow, and training may run out of memory."
    assert load(GPU_JOB).warnings == ()


# what a check may not refuse


def test_an_engine_of_ones_own_is_not_held_to_the_settings_of_the_trainer(load):
    job = "name: x\ncluster: v100\nengine: command\ncommand: [make]\nresources: {gpus_per_node: 4}\n"

    assert load(job + "runtime: conda\ntime_limit: 1h\nslurm: {partition: batch}\n").training.precision == "bf16"


def test_a_job_on_the_cpus_of_a_gpu_cluster_may_compute_in_bf16(load):
    job = "name: x\ncluster: v100\nmodel: tiny\ndata: {train: a}\nresources: {gpus_per_node: 0}\n"

    assert load(job + "runtime: conda\ntime_limit: 1h\nslurm: {partition: batch}\n").training.precision == "bf16"


def test_two_nodes_go_where_a_runtime_can_connect_them(load):
    two = GPU_JOB.replace("full-64x80g", "lora-8x80g") + "resources: {nodes: 2}\n"
    modern = two.replace("nine-g", "h100").replace("cpmlive-flash:0.0.4", "modern").replace("bmtrain", "torch")

    assert load(two).resources.nodes == 2  # rootless Docker 20.10 cannot, docker can
    assert load(modern + "runtime: docker-rootless\n").resources.nodes == 2  # 29.5.1 can


def test_an_empty_value_of_an_sbatch_option_is_a_flag(load):
    assert load(GPU_JOB + "slurm: {extra: {spread-job: '', comment: x}}\n").slurm.extra == {
        "spread-job": "",
        "comment": "x",
    }


@pytest.mark.parametrize(
    ("nodelist", "count"), [("g2001", 1), ("g[2001-2003,2007],h1", 5), ("a,b", 2), ("g[1,3]", 2), ("g[7-7]", 1)]
)
def test_nodes_are_counted_in_a_list_as_slurm_writes_it(load, refused, nodelist, count):
    job = GPU_JOB + f"slurm: {{nodelist: '{nodelist}'}}\n"

    assert load(job, f"resources.nodes={count}").slurm.nodelist == nodelist
    if count > 1:
        assert f"names {count} nodes" in refused(job, f"resources.nodes={count - 1}")[0]


def test_shared_memory_of_the_profile_can_be_dropped_for_that_of_the_node(load):
    job = GPU_JOB.replace("full-64x80g", "minimal-1x80g") + "container: {ipc: host}\nresources: {shm: null}\n"

    assert load(job).resources.shm_bytes is None


def test_the_cluster_describes_images_beside_their_archives(load, catalogue, tmp_path):
    """Any user gets size and digest; what one wrote oneself wins, and what ships comes last."""
    own, shipped, images = tmp_path / "own", catalogue.folders[0], tmp_path / "archives"
    (own / "images").mkdir(parents=True)
    images.mkdir()
    (tmp_path / "site.yaml").write_text(
        f"{{scheduler: slurm, runtimes: {{docker: {{}}}}, default_time: 1h, image_folder: {images}}}\n"
    )
    described = "{{tag: 'cpmlive-flash:0.0.4', gpu: false, torch: {torch}, archive: {{file: x.tar, bytes: 7}}}}\n"
    job = JOB_WITH_IMAGE + "cluster: ./site.yaml\n"
    both = Catalogue((own, shipped))
    assert load(job, catalogue=both).image.archive != Archive(file="x.tar", bytes=7)
    (images / "cpmlive-flash-0.0.4.yaml").write_text(described.format(torch="'2.9.1'"))
    found = load(job, catalogue=both).image
    assert (found.gpu, found.torch, found.archive) == (False, "2.9.1", Archive(file="x.tar", bytes=7))
    assert load(job, catalogue=both.without_stand_ins()).image.gpu
    (own / "images" / "cpmlive-flash-0.0.4.yaml").write_text(described.format(torch="'2.8.0'"))
    assert load(job, catalogue=both).image.torch == "2.8.0"


def test_a_mistake_in_a_file_beside_an_archive_is_named_there(refused, catalogue, tmp_path):
    images = tmp_path / "archives"
    images.mkdir()
    (tmp_path / "site.yaml").write_text(
        f"{{scheduler: slurm, runtimes: {{docker: {{}}}}, default_time: 1h, image_folder: {images}}}\n"
    )
    (images / "cpmlive-flash-0.0.4.yaml").write_text("tag: x\ntorhc: 1.0\n")
    (message,) = refused(JOB_WITH_IMAGE + "cluster: ./site.yaml\n")
    assert message.startswith(f"{images}/cpmlive-flash-0.0.4.yaml:2:1: torhc: ")
