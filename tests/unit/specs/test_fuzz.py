"""Whatever is in a job file or behind --set: a JobSpec or a SpecError, never a traceback, never another text."""

from __future__ import annotations

import copy
import dataclasses
import os
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cpm_cluster.specs.catalogue import Catalogue
from cpm_cluster.specs.compose import load_job
from cpm_cluster.specs.fields import Choice, ListOf, MapOf, Section, Text
from cpm_cluster.specs.image import Image
from cpm_cluster.specs.job import JobSpec, Lora, MethodField, Reference, Source, SourceField
from cpm_cluster.specs.model import Model
from cpm_cluster.specs.problems import SpecError

CATALOGUE = Catalogue((Path(__file__).parent / "configs",))
TRAINING = {
    "steps": 10,
    "lr": 1e-4,
    "precision": "fp16",
    "recompute": "full",
    "attention": "flash",
    "schedule": "wsd",
} | {"guard": {"nonfinite": "skip", "spike": "stop"}}
# Every key of a job file that takes text, in a job that the loader takes.
JOB = {
    "name": "demo",
    "description": "for the fuzz",
    "model": {"base": "tiny", "layers": 3, "block": "cpm9g", "assumed": "all", "source": "us"},
    "method": {"lora": {"rank": 4, "targets": ["project_q", "w_out"], "init_from": "adapter"}},
    "init_from": "weights.pt",
    "tokenizer": "vocab.txt",
    "profile": "lora-8x80g",
    "resources": {"nodes": 2, "gpu": "a100-80g", "shm": "8G"},
    "cluster": "nine-g",
    "image": {
        "base": "cpmlive-flash:0.0.4",
        "tag": "mine:1",
        "python": "3.8.10",
        "torch": "1.13.1",
        "cuda": "11.6",
        "min_driver": "450.80.02",
        "bmtrain": "0.2.3",
        "flash_attn": "2.0.8",
        "deepspeed": "0.9",
        "nccl": "2.14.3",
        "packages": {"einops": "0.6"},
        "env": {"A": "b"},
        "archive": {"file": "a.tar", "sha256": "0" * 64, "url": "https://example.org/a.tar"},
        "source": "us",
    },
    "runtime": "docker",
    "engine": "bmtrain",
    "code": "src",
    "task": "finetune",
    "data": {"train": ["a.jsonl", "b.jsonl"], "eval": ["c.jsonl"], "format": "jsonl"},
    "training": TRAINING,
    "evaluation": {"choices": ["d.jsonl"]},
    "samples": {"prompts": ["once upon a time"]},
    "time_limit": "24h",
    "mounts": {"/data": "/corpus:ro"},
    "env": {"NCCL_DEBUG": "INFO"},
    "secrets": ["WANDB_API_KEY"],
    "slurm": {
        "partition": "gpu1",
        "nodelist": "g2001",
        "exclude": "g2003",
        "account": "lab",
        "qos": "high",
        "reservation": "course",
        "constraint": "a100",
        "extra": {"comment": "x"},
    },
    "container": {"ipc": "private", "workdir": "/work"},
}
COMMAND_JOB = {
    "name": "demo",
    "cluster": "local",
    "profile": "cpu-2",
    "engine": "command",
    "command": ["python", "train.py"],
    "model": "tiny",
    "workload": {"mode": "train", "engine": "bmtrain", "precision": "fp16", "recompute": "full", "seq_len": 2048},
}
PATHS = {"data.train", "data.eval", "evaluation.choices", "code", "init_from", "method.lora.init_from", "tokenizer"}
LOOKED_UP = {"model.base", "image.base", "profile", "cluster"}  # a name leads to something else


def quick(examples):
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None)


@pytest.fixture(scope="module")
def job_file(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "job.yaml"


def composed(job_file, data, *overrides):
    """The JobSpec, or None after a SpecError of which every message is a line that begins with where it belongs."""
    job_file.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass"))
    try:
        return load_job(job_file, overrides, CATALOGUE, "local")
    except SpecError as error:
        assert error.problems
        for problem in error.problems:
            assert str(problem).isprintable()
            assert str(problem).startswith((f"{job_file}:", "configs/", "--set ")), str(problem)
            assert len(str(problem)) < 1000
        assert str(error).split("\n") == list(map(str, error.problems))
        return None


# writing YAML by hand: as a careful author or a program would


def yaml_of(value):
    """`value` in flow style; text in double quotes with everything but plain ASCII escaped."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"? {yaml_of(name)} : {yaml_of(child)}" for name, child in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(yaml_of, value)) + "]"
    if isinstance(value, str):
        plain = "abcdefghijklmnopqrstuvwxyz0123456789 _-./"
        return '"' + "".join(c if c in plain else f"\\U{ord(c):08X}" for c in value) + '"'
    return (
        {None: "null", True: "true", False: "false"}[value] if value is None or value in (True, False) else repr(value)
    )


def places(value, at=()):
    """Every value of a tree as a path of keys and indices; a key of a mapping as (…, name, KEY)."""
    if at:
        yield at
    if isinstance(value, dict):
        for name, child in value.items():
            yield from places(child, (*at, name))
    if isinstance(value, list):
        for index, child in enumerate(value):
            yield from places(child, (*at, index))


def value_at(tree, at):
    for part in at:
        tree = tree[part]
    return tree


def replaced(tree, at, value):
    tree = copy.deepcopy(tree)
    value_at(tree, at[:-1])[at[-1]] = value
    return tree


def renamed(tree, at, name):
    """`tree` with the last key of `at` called `name`."""
    tree = copy.deepcopy(tree)
    outer = value_at(tree, at[:-1])
    outer[name] = outer.pop(at[-1])
    return tree


def in_spec(spec, at):
    """What a JobSpec holds where the job file has `at`."""
    held = spec
    for part in at:
        if part in ("lora", "base"):
            continue
        held = held[part] if isinstance(held, (dict, tuple)) else getattr(held, part)
    return held.path if isinstance(held, Source) else held


STRINGS = [at for at in places(JOB) if isinstance(value_at(JOB, at), str)]
FREE_KEYS = [("mounts", "/data"), ("env", "NCCL_DEBUG"), ("slurm", "extra", "comment")]
FREE_KEYS += [("image", "packages", "einops"), ("image", "env", "A")]

HOSTILE = st.sampled_from(
    ['"', "'", "\\", "$(reboot)", "`reboot`", ";", "&", "|", "\n", "\r", "\t", "\0", ",", ":", "#", "%", "*", "{", "}"]
    + [
        "\x1b[2J",
        "\x85",
        "\xa0",
        "\u2028",
        "\u202e",
        "\ufeff",
        "\ud800",
        "\udfff",
        "\U0001f600",
        "九格",
        "é",
        "..",
        "~",
    ]
    + [
        "/",
        " ",
        "-",
        "=",
        "@",
        "null",
        "true",
        "1",
        "1.0",
        "/a",
        "/data",
        "a",
        "A",
        "g[1-2]",
        "builtin:",
        ".yaml",
        "./",
    ]
)
ANY_TEXT = st.one_of(
    st.lists(HOSTILE, max_size=6).map("".join),
    st.text(st.characters(exclude_categories=()), max_size=12),  # surrogates too
    st.text("aZ09._-/:~ ", max_size=70),
)


def near(word, text):
    """Texts that hold `text` and are, but for it, the good word."""
    return [text, word + text, text + word, word[: len(word) // 2] + text + word[len(word) // 2 :]]


# (a) anything as a job file


@quick(150)
@given(st.binary(max_size=200))
@example(b"\xef\xbb\xbf")
@example(b"\xff\xfen\0a\0m\0e\0")
@example(b"\xef\xbb\xbf\xff")
def test_any_bytes(job_file, data):
    composed(job_file, data)


@quick(150)
@given(st.text(st.characters(exclude_categories=()), max_size=200))
@example("a: \x85\tb: `")
@example("\u2028- %")
@example("? ? ? a")
@example("&a : *a")
@example("!!binary x: y")
@example("%YAML 9.9\n---\na: b")
def test_any_text(job_file, text):
    composed(job_file, text)


YAML_PARTS = ["name: ", "- ", "? ", ": ", "&a ", "*a", "<<: ", "{", "}", "[", "]", ", ", "\n", "\n  ", "\n\t", '"', "'"]
YAML_PARTS += ["|", ">", "!", "!!str ", "#", "%", "---\n", "...\n", "~", "model: ", "training:\n  ", "env: ", "x", "1"]


@quick(150)
@given(st.lists(st.sampled_from(YAML_PARTS), max_size=30).map("".join))
def test_any_pieces_of_yaml(job_file, text):
    composed(job_file, text)


@quick(150)
@given(st.data())
def test_a_job_file_with_a_piece_cut_out_or_put_in(job_file, data):
    good = yaml_of(JOB).replace("? ", "\n ").replace(" :", ":").encode()
    start = data.draw(st.integers(0, len(good)))
    end = data.draw(st.integers(start, min(start + 20, len(good))))
    put_in = data.draw(st.one_of(st.binary(max_size=6), st.sampled_from(YAML_PARTS).map(str.encode)))

    composed(job_file, good[:start] + put_in + good[end:])


# (b) any text in any place that takes text


def test_the_job_of_these_tests_is_good_and_has_every_key_that_takes_text(job_file):
    def keys(spec, at):
        for field in dataclasses.fields(spec):
            type_ = field.metadata.get("type")
            inner = type_.spec if isinstance(type_, (Section, Reference)) else None
            if inner:
                yield from keys(inner, (*at, field.name))
            elif isinstance(type_, MethodField):
                yield from keys(Lora, (*at, field.name, "lora"))
            elif isinstance(type_, (Text, Choice)) or (
                isinstance(type_, (ListOf, MapOf)) and isinstance(type_[0], (Text, Choice, SourceField))
            ):
                yield (*at, field.name)

    assert composed(job_file, yaml_of(JOB)) is not None
    assert composed(job_file, yaml_of(COMMAND_JOB)) is not None
    assert set(keys(JobSpec, ())) - set(places(JOB)) - set(places(COMMAND_JOB)) == {("generation", "prompts")}
    assert {Image, Model} <= {
        f.metadata["type"].spec for f in dataclasses.fields(JobSpec) if f.name in ("image", "model")
    }


@quick(700)
@given(st.sampled_from(STRINGS), ANY_TEXT, st.integers(0, 3))
def test_any_text_in_a_string_is_refused_or_held_exactly(job_file, at, text, way):
    text = near(value_at(JOB, at), text)[way]
    spec = composed(job_file, yaml_of(replaced(JOB, at, text)))

    if spec is not None:
        dotted = ".".join(map(str, at[:-1] if isinstance(at[-1], int) else at))
        if dotted in LOOKED_UP:
            assert text in (value_at(JOB, at), spec.model_name, spec.cluster_name, spec.profile)
        elif dotted in PATHS:
            if not text.startswith("builtin:") and text not in ("bytes", "nine-g"):
                assert in_spec(spec, at) == str(job_file.parent / os.path.expanduser(text))
        elif dotted not in ("resources.shm", "time_limit"):
            assert in_spec(spec, at) == text
        if not isinstance(at[-1], int):
            assert spec.origins[dotted].text == text


@quick(250)
@given(st.sampled_from(FREE_KEYS), ANY_TEXT, st.integers(0, 3))
def test_any_text_as_a_free_key_is_refused_or_held_exactly(job_file, at, text, way):
    text = near(at[-1], text)[way]
    spec = composed(job_file, yaml_of(renamed(JOB, at, text)))

    if spec is not None:
        name = os.path.expanduser(text) if at[0] == "mounts" else text
        assert in_spec(spec, (*at[:-1], name)) == value_at(JOB, at)


@quick(150)
@given(st.sampled_from(list(places(JOB))), ANY_TEXT)
def test_any_text_as_a_key_is_refused_unless_it_is_known(job_file, at, text):
    if isinstance(at[-1], str):
        composed(job_file, yaml_of(renamed(JOB, at, text)))


@quick(150)
@given(st.lists(ANY_TEXT, max_size=4))
def test_the_command_holds_exactly_the_arguments_that_were_written(job_file, command):
    spec = composed(job_file, yaml_of({**COMMAND_JOB, "command": command}))

    if spec is not None:
        assert spec.command == tuple(command)


@quick(120)
@given(st.dictionaries(st.from_regex(r"[A-Z_][A-Z0-9_]{0,5}", fullmatch=True), ANY_TEXT, max_size=3))
def test_the_environment_holds_exactly_the_values_that_were_written(job_file, env):
    spec = composed(job_file, yaml_of({**JOB, "env": env}))

    if spec is not None:
        assert spec.env == env


# (c) anything behind --set

GOOD = yaml_of(JOB)
DOTTED = [".".join(map(str, at)) for at in places(JOB) if all(isinstance(part, str) for part in at)]


@quick(150)
@given(st.lists(ANY_TEXT, min_size=1, max_size=3))
def test_any_options(job_file, options):
    composed(job_file, GOOD, *options)


@quick(250)
@given(st.sampled_from(DOTTED), st.one_of(ANY_TEXT, st.lists(st.sampled_from(YAML_PARTS), max_size=8).map("".join)))
def test_any_value_of_a_known_key(job_file, key, value):
    composed(job_file, GOOD, f"{key}={value}")


@quick(150)
@given(st.sampled_from(STRINGS), ANY_TEXT)
def test_text_in_quotes_behind_set_is_refused_or_held_exactly(job_file, at, text):
    if at[0] in ("slurm", "samples", "description", "env", "container") and all(isinstance(part, str) for part in at):
        spec = composed(job_file, GOOD, f"{'.'.join(at)}={yaml_of(text)}")
        if spec is not None:
            assert in_spec(spec, at) == text


# (d) anything in place of a part of a job

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    ANY_TEXT,
    st.sampled_from(["1e999", "9" * 5000, "x" * 5000, "10:30", "24h", "1.5G", "g[3-1]", "0x10", "010", "-0", "1_000"]),
)
TREES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.one_of(ANY_TEXT, st.sampled_from(["base", "lora", "train", "RANK"])), inner, max_size=4)
    ),
    max_leaves=8,
)


def plainly(value):
    """As `yaml_of`, with text that needs no quotes left without: numbers, sizes and words as people write them."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"? {yaml_of(name)} : {plainly(child)}" for name, child in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(plainly, value)) + "]"
    safe = isinstance(value, str) and value.isascii() and value.replace(".", "").replace("_", "").isalnum()
    return value if safe else yaml_of(value)


@quick(500)
@given(st.sampled_from(list(places(JOB))), TREES)
def test_a_job_of_which_a_part_is_something_else(job_file, at, value):
    composed(job_file, plainly(replaced(JOB, at, value)))


@quick(150)
@given(st.lists(st.tuples(st.sampled_from(list(places(COMMAND_JOB))), TREES), min_size=2, max_size=3))
def test_a_job_of_which_several_parts_are_something_else(job_file, changes):
    job = COMMAND_JOB
    for at, value in changes:
        if at in set(places(job)):
            job = replaced(job, at, value)

    composed(job_file, plainly(job))


@quick(120)
@given(st.dictionaries(st.sampled_from([*JOB, "command", "seed", "signal_lead"]), TREES, max_size=6))
def test_a_job_of_known_keys_with_anything_in_them(job_file, job):
    composed(job_file, plainly(job))
