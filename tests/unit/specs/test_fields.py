"""Field types: what each takes, what it says of the rest, and how a section is read as a whole."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from cpm_cluster.specs.fields import (
    DURATION,
    SIZE,
    Boolean,
    Choice,
    Integer,
    Invalid,
    ListOf,
    MapOf,
    Number,
    Reading,
    Section,
    Text,
    described,
    key,
)
from cpm_cluster.specs.nodes import parse_value
from cpm_cluster.specs.problems import did_you_mean, listed, printable, quoted


@dataclass(frozen=True, kw_only=True)
class Engine:
    """How it runs."""

    threads: int = key(Integer(1, 64), "threads of a rank", 1)
    memory_bytes: int | None = key(SIZE, "host memory", None)


@dataclass(frozen=True, kw_only=True)
class Program:
    """A program."""

    name: str = key(Text(r"[a-z]+", "a word"), "its name")
    steps: int = key(Integer(1), "steps to take")
    engine: Engine = key(Section(Engine), "how it runs", factory=Engine)
    env: dict[str, str] = key(MapOf(Text(), "[A-Z]+", "a capital word"), "environment", factory=dict)


def read(type_, text):
    problems = []
    node = parse_value(text.encode(), "f.yaml", "job", problems)
    assert problems == []
    return type_.read(node, "k", Reading(problems))


def refusal(type_, text):
    problems = []
    node = parse_value(text.encode(), "f.yaml", "job", [])
    with pytest.raises(Invalid):
        type_.read(node, "k", Reading(problems))
    return [problem.what for problem in problems]


def read_program(text, lenient=False):
    """(the program, None where it was refused; the messages)"""
    reading = Reading([], lenient=lenient)
    try:
        program = Section(Program).read(parse_value(text.encode(), "f.yaml", "job", []), "", reading)
    except Invalid:
        program = None
    return program, sorted(str(problem) for problem in reading.problems)


@pytest.mark.parametrize(
    ("type_", "text", "value"),
    [
        (Text(), "1.10", "1.10"),
        (Text(), "''", ""),
        (Text(), "true", "true"),
        (Text(multiline=True), '"a\\n\\tb"', "a\n\tb"),
        (Text(r"[a-z]*", "a word"), "''", ""),
        (Integer(), "1_000", 1000),
        (Integer(-5), "-3", -3),
        (Integer(), "+7", 7),
        (Number(), "1e-4", 1e-4),
        (Number(), ".5", 0.5),
        (Number(), "3", 3.0),
        (Boolean(), "false", False),
        (Choice(("a", "b")), "'b'", "b"),
        (SIZE, "4GiB", 4 << 30),
        (DURATION, "24:00:00", 86_400),
        (ListOf(Integer()), "[1, 2]", (1, 2)),
        (ListOf(Integer()), "[]", ()),
        (ListOf(Text(), or_one=True), "alone", ("alone",)),
        (MapOf(Integer(), "[a-z]+", "a word"), "{x: 1}", {"x": 1}),
        (MapOf(Integer(), "[a-z]+", "a word"), "", {}),
    ],
)
def test_what_is_taken(type_, text, value):
    assert read(type_, text) == value


@pytest.mark.parametrize(
    ("type_", "text", "what"),
    [
        (Text(), "[a]", "is a list; write text"),
        (Text(), "", "is nothing; write text"),
        (Text(), '"a\\0b"', r'"a\x00b" holds control characters; write text'),
        (Text(), '"a\\nb"', r'"a\nb" holds control characters; write text'),
        (Text(), '"a\\x9bb"', r'"a\x9bb" holds control characters; write text'),
        (Text(multiline=True), '"a\\rb"', r'"a\rb" holds control characters; write text'),
        (Text(r"[a-z]+", "a word"), "'  '", "is empty; write a word"),
        (Text(r"[a-z]+", "a word"), "A b", '"A b" is not allowed; write a word'),
        (Text(max_length=3), "abcd", "is 4 characters long; write text of at most 3 characters"),
        (Integer(), "many", '"many" is not a whole number of 0 or more'),
        (Integer(), "1.0", '"1.0" is not a whole number of 0 or more'),
        (Integer(), "010", '"010" is not a whole number of 0 or more'),
        (Integer(), "'7'", '"7" is text; write it without quotes'),
        (Integer(1, 8), "9", "9 is out of range; write a whole number from 1 to 8"),
        (Integer(), "{a: 1}", "is a mapping; write a whole number of 0 or more"),
        (Number(), "nan", '"nan" is not a number of 0 or more'),
        (Number(), ".inf", '".inf" is not a number of 0 or more'),
        (Number(), "1e999", '"1e999" is not a number of 0 or more'),
        (Number(), "1,5", '"1,5" is not a number of 0 or more'),
        (Number(above_minimum=True, maximum=1), "0", "0 is out of range; write a number above 0 and at most 1"),
        (Number(), '"0.1"', '"0.1" is text; write it without quotes'),
        (Boolean(), "yes", '"yes" is not allowed; write true or false'),
        (Boolean(), "TRUE", '"TRUE" is not allowed; write true or false'),
        (Boolean(), "'true'", '"true" is text; write it without quotes'),
        (Choice(("fp32", "bf16")), "BF16", '"BF16" is not allowed; write fp32 or bf16 (did you mean bf16?)'),
        (SIZE, "4", '"4" has no unit; write a size with its unit, such as 512G, 4GiB or 80GB'),
        (SIZE, "0G", '"0G" is too small; write a size with its unit, such as 512G, 4GiB or 80GB'),
        (ListOf(Integer()), "3", 'is "3"; write a list, [a, b]'),
        (ListOf(Integer(), minimum=2), "[1]", "is too short; write a list, [a, b] (2 or more)"),
        (MapOf(Text(), "[a-z]+", "a word"), "[a]", "is a list; write a mapping, {key: value}"),
        (MapOf(Text(), "[a-z]+", "a word"), "{X: 1}", '"X" is not a word'),
        (MapOf(Text(), "/.*", "a path"), '{"/\\e[2J": 1}', r'"/\x1b[2J" is not a path'),
    ],
)
def test_what_is_refused_and_what_is_said(type_, text, what):
    assert refusal(type_, text) == [what]


def test_every_item_that_is_wrong_is_named():
    assert refusal(ListOf(Integer(1)), "[0, 1, x]") == [
        "0 is out of range; write a whole number of 1 or more",
        '"x" is not a whole number of 1 or more',
    ]


def test_a_section_is_read_with_its_defaults():
    program, messages = read_program("name: a\nsteps: 3\nengine: {memory: 4G}\nenv:\n")

    assert messages == []
    assert program == Program(name="a", steps=3, engine=Engine(memory_bytes=4 << 30))


def test_a_key_without_a_value_has_its_default():
    assert read_program("name: a\nsteps: 3\nengine: {threads: , memory: ~}\n")[0].engine == Engine()


def test_all_that_is_wrong_in_a_section_is_said_at_once_with_its_path_and_place():
    program, messages = read_program("nam: a\nengine:\n  threads: 0\n  speed: 1\nenv: {A: 1, b: 2}\n")

    assert program is None
    assert messages == [
        "f.yaml:1:1: nam: is not a known key (did you mean name?)",
        "f.yaml:1:1: steps: is missing: steps to take",  # but not of name, which is written as nam
        "f.yaml:3:12: engine.threads: 0 is out of range; write a whole number from 1 to 64",
        "f.yaml:4:3: engine.speed: is not a known key; known here: threads, memory",
        'f.yaml:5:13: env: "b" is not a capital word',
    ]


def test_a_lenient_reading_gives_what_could_be_read_and_says_what_could_not():
    reading = Reading([], lenient=True)
    node = parse_value(b"name: 7\nsteps: 2\nengine: {thread: 3, memory: 4}\nenv: {A: x, b: y}\n", "f.yaml", "job", [])

    program = Section(Program).read(node, "", reading)

    assert program == Program(name=None, steps=2, env={"A": "x"})
    assert len(reading.problems) == 4
    assert all(map(reading.is_unread, ("name", "engine.threads", "engine.memory", "engine", "env", "env.b")))
    assert not any(map(reading.is_unread, ("steps", "names", "environment")))


def test_described_lists_every_key_that_was_read():
    found = list(described(Program(name="a", steps=1)))

    assert ("name", "a", "its name") in found
    assert ("engine.memory", None, "host memory") in found


def test_a_suggestion_is_near_in_letters_or_begins_alike():
    keys = ("nodes", "gpu", "gpus_per_node", "memory_per_node", "lr", "w_0", "w_1")

    assert did_you_mean("node", keys) == " (did you mean nodes?)"
    assert did_you_mean("gpus", keys) == " (did you mean gpu or gpus_per_node?)"
    assert did_you_mean("memory", keys) == " (did you mean memory_per_node?)"
    assert did_you_mean("LR", keys) == " (did you mean lr?)"
    assert did_you_mean("learning_rate", keys) == ""


def test_lists_in_messages_are_cut_and_say_so():
    assert listed([]) == "nothing"
    assert listed(["a"]) == "a"
    assert listed("abc") == "a, b or c"
    assert listed(map(str, range(40))).endswith("30, 31 … (40 in all)")


def test_text_in_messages_stays_on_its_line_and_cannot_drive_the_terminal():
    assert quoted("a\n\x1b[2J" + "b" * 100) == r'"a\n\x1b[2J' + "b" * 53 + '…"'
    assert printable("九格\u202e\ud800\x7f") == "九格\\u202e\\ud800\\x7f"
