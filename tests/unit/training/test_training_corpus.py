"""Reading text: files and patterns, what is tolerated, and everything that is wrong at once."""

from __future__ import annotations

import gzip
import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpm_cluster.training.data import corpus
from cpm_cluster.training.data.corpus import PYTHON_REFERENCE, JsonLines, Row, list_parts, read_rows
from cpm_cluster.training.errors import UserError


def line(output: str, **more: object) -> str:
    return json.dumps({"input": "", "output": output, **more}, ensure_ascii=False) + "\n"


def read(*sources: object) -> list[Row]:
    return read_rows([str(source) for source in sources], "train")


def problems_of(*sources: object) -> str:
    with pytest.raises(UserError) as caught:
        read(*sources)
    return str(caught.value)


def test_rows_are_read_in_order_from_all_files(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text(line(name, source="more keys do no harm"))

    assert read(tmp_path / "b", tmp_path / "a") == [Row("", "b"), Row("", "a")]


def test_a_pattern_means_all_files_that_match_it_by_name(tmp_path):
    for name in ("2.jsonl", "10.jsonl", "deep/er/3.jsonl", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(line(name))

    assert [row.output for row in read(tmp_path / "*.jsonl")] == ["10.jsonl", "2.jsonl"]
    assert [row.output for row in read(tmp_path / "**/*.jsonl")] == ["10.jsonl", "2.jsonl", "deep/er/3.jsonl"]
    assert "*.csv: matches no file" in problems_of(tmp_path / "*.csv")
    assert "2 problem(s)" in problems_of(tmp_path / "*.csv", tmp_path / "*.tsv")
    assert f"is a folder; write {tmp_path}/*.jsonl" in problems_of(tmp_path)


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path):
    (tmp_path / "[a].jsonl").write_text(line("itself"))

    assert read(tmp_path / "[a].jsonl") == [Row("", "itself")]


def test_what_other_systems_add_to_a_text_file_does_no_harm(tmp_path):
    path = tmp_path / "windows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + (line("eins") + line("zwei ünd")).replace("\n", "\r\n").encode() + b"\r\n \n\n")

    assert read(path) == [Row("", "eins"), Row("", "zwei ünd")]


def test_a_last_line_need_not_end(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(line("a") + line("b").rstrip())

    assert [row.output for row in read(path)] == ["a", "b"]


def test_every_problem_is_reported_by_file_and_line(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(
        b'{"input": "", "output": "x"}\n[]\n\xff\n\n{"input": "", "output": ""}\n{"output": "x"}\n'
        b'{"input": "", "output": "cut\0\0\0\n{"input": "", "output": 3}\n' + b"[" * 100_000 + b"\n"
    )
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "blank.jsonl").write_text(" \n\n")

    message = problems_of(path, tmp_path / "empty.jsonl", tmp_path / "blank.jsonl", tmp_path / "absent.jsonl")

    assert "11 problem(s)" in message
    expected = [
        "2: is not an object",
        "3: is not UTF-8 from byte 1 on",
        "4: is not JSON: the line is blank",
        '5: "output" is empty',
        '6: has no "input"',
        "7: has NUL bytes",
        '8: "output" is not a text',
        "9: is not JSON",
    ]
    for problem in expected:
        assert f"{path}:{problem}" in message
    assert "empty.jsonl: is empty" in message and "blank.jsonl: is empty" in message
    assert "absent.jsonl: cannot be read: No such file" in message


def test_a_thousand_problems_are_counted_not_listed(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text("nonsense\n" * 1000)

    message = problems_of(path)

    assert "1000 problem(s)" in message and "and 980 more" in message
    assert len(message) < 5000


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(max_size=30), min_size=1, max_size=12), st.integers(1, 80), st.booleans())
def test_a_file_in_parts_has_the_same_lines_as_the_file(tmp_path_factory, texts, part_bytes, ends):
    path = tmp_path_factory.mktemp("corpus") / "rows.jsonl"
    path.write_text("".join(line("x" + text) for text in texts)[: None if ends else -1], encoding="utf-8")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "PART_BYTES", part_bytes)
        parts = list_parts(str(path), "train", [])

    assert [row.output for part in parts for row in part.read()] == ["x" + text for text in texts]
    assert sum(part.nbytes for part in parts) == len(path.read_bytes().rstrip())


def test_a_file_that_shrinks_while_it_is_read_is_noticed(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(line("a"))

    rows = list(JsonLines(str(path), 0, 1000, 0).read())

    assert rows == [Row("", "a"), "is missing: the file has become shorter"]


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (gzip.compress(b"{}", mtime=0), "is compressed by gzip; unpack it first"),
        (line("a").encode("utf-16"), "is UTF-16; make UTF-8 of it"),
        (b"[\n" + line("a").encode() + b"]\n", "is one JSON array; write an object a line"),
        (b"PAR1\0\0", "is Parquet; make jsonl of it"),
    ],
)
def test_a_file_of_another_kind_is_told_by_name_not_line_by_line(tmp_path, content, what):
    (tmp_path / "rows.jsonl").write_bytes(content)

    assert problems_of(tmp_path / "rows.jsonl") == f"the data have 1 problem(s): {tmp_path}/rows.jsonl: {what}"


def test_a_row_that_says_a_thing_twice_is_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"input": "", "output": "one", "output": "other"}\n')

    assert 'rows.jsonl:1: is not JSON: it has the key "output" twice' in problems_of(tmp_path / "rows.jsonl")


def test_what_is_no_file_is_refused_without_waiting_for_it(tmp_path):
    os.mkfifo(tmp_path / "pipe")

    assert f"{tmp_path}/pipe: is a pipe or a device" in problems_of(tmp_path / "pipe")


def test_the_built_in_corpus_keeps_evaluation_text_out_of_training():
    train, held_out = (read_rows([PYTHON_REFERENCE], use) for use in ("train", "eval"))

    def paragraphs(rows):
        return {paragraph for row in rows for paragraph in row.output.split("\n")}

    assert not paragraphs(train) & paragraphs(held_out)
    assert 0.02 < len(held_out) / len(train) < 0.1
    assert sum(len(row.output) for row in train) > 200_000
    assert train == read_rows([PYTHON_REFERENCE], "train")
