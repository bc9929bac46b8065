"""YAML as a tree with positions: what is kept, what is refused, how layers are laid over each other."""

from __future__ import annotations

import os

import pytest

from cpm_cluster.specs.nodes import (
    MAX_DEPTH,
    MAX_NODES,
    ListNode,
    MapNode,
    ScalarNode,
    leaves,
    merged,
    parse_value,
    parse_yaml,
    read_yaml,
    written,
)


def tree(text, set_by="job"):
    problems = []
    node = parse_yaml(text.encode(), "f.yaml", set_by, problems)
    assert problems == []
    return node


def refusals(data):
    problems = []
    node = parse_yaml(data if isinstance(data, bytes) else data.encode(), "f.yaml", "job", problems)
    return node, [str(problem) for problem in problems]


def test_every_value_remembers_where_it_stands_and_who_wrote_it():
    node = tree("a: 1\nb:\n  c: [x,\n      y]\n", "profile")

    assert str(node.entries["a"].where) == "f.yaml:1:4"
    assert str(node.entries["b"].entries["c"].items[1].where) == "f.yaml:4:7"
    assert str(node.key_where["b"]) == "f.yaml:2:1"
    assert node.entries["a"].set_by == "profile"


def test_scalars_stay_the_text_that_was_written():
    node = tree("time: 24:00:00\nlr: 1e-4\nversion: 1.10\nday: 2024-01-01\nflag: yes\noctal: 010\n")

    texts = [value.text for value in node.entries.values()]
    assert texts == ["24:00:00", "1e-4", "1.10", "2024-01-01", "yes", "010"]


@pytest.mark.parametrize("nothing", ["", "~", "null", "Null", "NULL", "# a comment"])
def test_a_value_that_is_left_out_is_null(nothing):
    assert tree(f"a: {nothing}\n").entries["a"].is_null


@pytest.mark.parametrize("text", ["''", '""', "'null'", '"~"', "none", "|-\n  null"])
def test_quoted_text_is_never_null(text):
    assert not tree(f"a: {text}\n").entries["a"].is_null


def test_a_byte_order_mark_is_no_part_of_the_first_key():
    node, problems = refusals(b"\xef\xbb\xbfname: x\n")

    assert problems == [] and list(node.entries) == ["name"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "f.yaml: is empty; write `key: value` lines"),
        (b"---\n", "f.yaml: is empty; write `key: value` lines"),
        (b"just words", 'f.yaml:1:1: is "just words"; write `key: value` lines'),
        (b"name: \xff\n", "f.yaml:1:7: is not UTF-8 text; save the file as UTF-8"),
        (b"\xef\xbb\xbfname: \xff\n", "f.yaml:1:7: is not UTF-8 text; save the file as UTF-8"),
        ("名: 九\0\n".encode(), "f.yaml:1:5: holds the control character U+0000, which YAML does not allow; remove it"),
        (b"a: 1\nb: \x1b[2J\n", "f.yaml:2:4: holds the control character U+001B, which YAML does not allow; remove it"),
        (b"a: `date`\n", "f.yaml:1:4: is not valid YAML: a value cannot start with `; put it in quotes"),
        (b"a: @home\n", "f.yaml:1:4: is not valid YAML: a value cannot start with @; put it in quotes"),
        (b"a: {b: 1\n", "f.yaml:2:1: is not valid YAML: a comma is missing here, or the } of the mapping that begins"),
        (b"a: 1\nb\n", "f.yaml:3:1: is not valid YAML: a colon is missing: every line is `key: value`"),
        (b"a: *b\n", "f.yaml:1:4: is not valid YAML: a value that starts with * repeats one that was marked with &"),
        (b"a:\n- 1\nb: 2\n- 3\n", "f.yaml:4:1: is not valid YAML: the indentation is not that of the lines above"),
    ],
)
def test_what_cannot_be_read_is_refused_at_its_place(data, message):
    node, problems = refusals(data)

    assert node is None
    assert len(problems) == 1 and problems[0].startswith(message)


def test_a_duplicate_key_is_named_with_its_path_and_the_first_one_counts():
    node, problems = refusals("a:\n- b: 1\n  c: 2\n  b: 3\n")

    assert problems == ["f.yaml:4:3: a[0].b: is written twice (first in line 2); keep one"]
    assert node.entries["a"].items[0].entries["b"].text == "1"


def test_a_mapping_is_read_up_to_the_greatest_depth_and_not_further():
    assert refusals("[" * MAX_DEPTH + "]" * MAX_DEPTH)[1] == ["f.yaml:1:1: is a list; write `key: value` lines"]
    for depth in (MAX_DEPTH + 1, 600, 100_000):
        node, problems = refusals("[" * depth + "]" * depth)
        assert node is None and len(problems) == 1
        assert f"is nested deeper than {MAX_DEPTH} levels" in problems[0]


def test_as_many_values_are_read_as_are_allowed_and_not_more():
    assert refusals("a: [" + "x, " * (MAX_NODES - 2) + "]")[1] == []
    assert f"stands for more than {MAX_NODES:,} values" in refusals("a: [" + "x, " * (MAX_NODES - 1) + "]")[1][0]


def test_an_alias_stands_for_the_value_that_it_repeats():
    node = tree("a: &x [1, 2]\nb: *x\n")

    assert written(node.entries["b"]) == "[1, 2]"


def test_a_file_that_cannot_be_read_says_why(tmp_path):
    (tmp_path / "large.yaml").write_bytes(b"a: 1\n" * 300_000)
    os.mkfifo(tmp_path / "pipe.yaml")  # to which nobody writes
    problems = []

    for name in ("missing.yaml", ".", "large.yaml", "pipe.yaml", "n\0l"):
        assert read_yaml(tmp_path / name, "job", problems, shown_as=name) is None

    assert [str(problem) for problem in problems] == [
        "missing.yaml: cannot be read: No such file or directory",
        ".: cannot be read: Is a directory",
        "large.yaml: is larger than 1 MiB; that is not a file of this kind",
        "pipe.yaml: is a pipe or a device; save it as a file",
        r"n\x00l: cannot be read: embedded null byte",
    ]


def test_a_value_of_the_command_line_has_no_lines():
    problems = []
    node = parse_value(b"{a: [1", "--set x={a: [1", "--set", problems)

    assert node is None
    assert str(problems[0]).startswith("--set x={a: [1: is not valid YAML: a comma is missing here")


def test_upper_layers_win_key_by_key_in_mappings_and_whole_elsewhere():
    lower, upper = tree("a: {x: 1, y: 2}\nb: [1, 2]\nc: 3\n"), tree("a: {y: 5}\nb: [9]\nd: {z: 1}\n")

    assert {path: written(node) for path, node in leaves(merged(lower, upper))} == {
        "a.x": "1",
        "a.y": "5",
        "b": "[9]",
        "c": "3",
        "d.z": "1",
    }


def test_a_key_without_a_value_resets_a_value_but_leaves_a_mapping_alone():
    result = merged(tree("a: {x: 1}\nb: 2\n"), tree("a:\nb:\n"))

    assert written(result) == "{a: {x: 1}, b: }"


def test_a_merged_mapping_lies_where_its_upper_layer_was_written():
    lower, upper = tree("a: {x: 1}\n", "profile"), tree("\n\na: {y: 2}\n", "job")
    option = parse_value(b"{y: 3}", "--set a={y: 3}", "--set", [])

    assert str(merged(lower, upper).entries["a"].where) == "f.yaml:3:4"
    assert str(merged(upper.entries["a"], option).where) == "f.yaml:3:4"


def test_the_kinds_of_node_are_told_apart():
    node = tree("a: 1\nb: [1]\nc: {d: 1}\n")

    assert [type(child) for child in node.entries.values()] == [ScalarNode, ListNode, MapNode]
