"""The JSON Schemas for editors: valid, and never stricter than the loader."""

from __future__ import annotations

import copy
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cpm_cluster.specs.catalogue import Catalogue
from cpm_cluster.specs.compose import load_job
from cpm_cluster.specs.problems import SpecError
from cpm_cluster.specs.schema import KINDS, json_schema

CONFIGS = Path(__file__).parent / "configs"
FOLDERS = {"profile": "profiles", "cluster": "clusters", "model": "models", "image": "images"}
FILES = [(kind, path) for kind, folder in FOLDERS.items() for path in sorted((CONFIGS / folder).glob("*.yaml"))]

# A job in which every section of the job file is there. The loader takes it.
FULL_JOB = {
    "name": "demo",
    "description": "all sections",
    "model": {"base": "tiny", "layers": 3, "norm_eps": 1e-6, "assumed": "layers"},
    "method": {
        "lora": {"rank": 4, "alpha": 8.0, "dropout": 0.1, "targets": ["project_q", "w_out"], "init_from": "adapter"}
    },
    "init_from": "weights.pt",
    "tokenizer": "nine-g",
    "profile": "lora-8x80g",
    "resources": {"nodes": 1, "gpu": "a100-80g", "cpus_per_node": 32, "shm": "8G", "disk": "1.5 TiB"},
    "cluster": "nine-g",
    "image": {
        "base": "cpmlive-flash:0.0.4",
        "tag": "mine:1",
        "env": {"A": "b"},
        "archive": {"file": "a.tar", "bytes": 7},
    },
    "runtime": "docker",
    "engine": "bmtrain",
    "code": "src",
    "data": {"train": ["a.jsonl", "b.jsonl"], "eval": "c.jsonl"},
    "training": {"steps": 10, "lr": 1.5e-4, "betas": [0.9, 0.95], "precision": "fp16", "checkpoint": {"every": 5}},
    "samples": {"prompts": ["one\ntwo"], "max_tokens": 8, "temperature": 0.0},
    "seed": 7,
    "deterministic": True,
    "time_limit": "2-00:00:00",
    "mounts": {"/data": "/corpus:ro"},
    "env": {"NCCL_DEBUG": "INFO"},
    "secrets": ["WANDB_API_KEY"],
    "slurm": {"partition": "gpu1", "nodelist": "g2001", "extra": {"comment": "x", "spread-job": ""}},
    "container": {"ipc": "private", "workdir": "/work"},
    "signal_lead": "10m",
}
SCHEMA = jsonschema.Draft202012Validator(json_schema("job"))


def paths(value, at=()):
    """Every place in a tree of mappings and lists."""
    if at:
        yield at
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, child in children:
        yield from paths(child, (*at, name))


def changed(tree, at, value):
    tree = copy.deepcopy(tree)
    inner = tree
    for name in at[:-1]:
        inner = inner[name]
    inner[at[-1]] = value
    return tree


def composes(job, path):
    path.write_text(yaml.safe_dump(job, allow_unicode=True), "utf-8")
    try:
        load_job(path, [], Catalogue((CONFIGS,)), "local")
    except SpecError:
        return False
    return True


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 100),
    st.floats(0, 2, allow_nan=False),
    st.sampled_from(
        ["a", "1", "0.5", "1e-4", "512G", "30m", "tiny", "full", "lora", "g[1-2]", "/a", "/a:ro", "x.jsonl"]
    ),
    st.sampled_from([[], {}, ["a"], ["/a", "w_0"], [0.9, 0.99], {"A": "b"}, {"lora": None}, {"/a": "/b"}]),
    st.text("aZ0 -_./:é", max_size=6),
)


@pytest.fixture(scope="module")
def job_file(tmp_path_factory):
    return tmp_path_factory.mktemp("schema") / "job.yaml"


@pytest.mark.parametrize("kind", KINDS)
def test_the_schema_is_one(kind):
    schema = json_schema(kind)

    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"


@pytest.mark.parametrize(("kind", "path"), FILES, ids=[f"{kind}-{path.stem}" for kind, path in FILES])
def test_the_schema_tells_a_good_file_from_a_broken_one(kind, path):
    errors = list(jsonschema.Draft202012Validator(json_schema(kind)).iter_errors(yaml.safe_load(path.read_text())))

    assert bool(errors) == (path.stem == "broken")


def test_the_schema_takes_the_gpu_catalogue():
    jsonschema.validate(yaml.safe_load((CONFIGS / "gpus.yaml").read_text()), json_schema("gpu"))


def test_every_key_has_its_meaning_and_no_other_key_is_known():
    def check(schema, at):
        for name, value in schema.get("properties", {}).items():
            assert value.get("description") or name in ("base", "lora"), f"{at}.{name} says nothing"
            check(value, f"{at}.{name}")
        assert "properties" not in schema or schema["additionalProperties"] is False, at

    for kind in KINDS:
        check(json_schema(kind), kind)


def test_a_job_with_every_section_is_good_for_both(job_file):
    assert composes(FULL_JOB, job_file)
    assert [error.message for error in SCHEMA.iter_errors(FULL_JOB)] == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("nmae", "x"),
        ("name", "-x"),
        ("engine", "bmtrian"),
        ("seed", -1),
        ("time_limit", 24),
        ("resources", {"shm": 4}),
        ("training", {"precision": "fp8"}),
        ("training", {"lr": 0}),
        ("secrets", "TOKEN"),
        ("env", {"1A": "x"}),
        ("command", "python train.py"),
    ],
)
def test_what_the_schema_refuses_the_loader_refuses(key, value, job_file):
    job = {**FULL_JOB, key: value}

    assert not SCHEMA.is_valid(job)
    assert not composes(job, job_file)


@settings(max_examples=250, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(list(paths(FULL_JOB))), VALUES)
def test_what_the_loader_accepts_the_schema_accepts(job_file, at, value):
    job = changed(FULL_JOB, at, value)

    if composes(job, job_file):
        assert [error.message for error in SCHEMA.iter_errors(job)] == []


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.sets(st.sampled_from(sorted(FULL_JOB))))
def test_a_job_may_leave_out_for_the_schema_what_it_may_for_the_loader(job_file, left_out):
    job = {key: value for key, value in FULL_JOB.items() if key not in left_out}

    if composes(job, job_file):
        assert [error.message for error in SCHEMA.iter_errors(job)] == []
