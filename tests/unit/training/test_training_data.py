"""From text to batches: checking, packing, order, and each rank's share."""

from __future__ import annotations

import json
from array import array

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cpm_cluster.training.corpus import PYTHON_REFERENCE, Row, read_rows
from cpm_cluster.training.errors import UserError
from cpm_cluster.training.packing import (
    IGNORED,
    PackedStream,
    Position,
    Sample,
    best_fit,
    collate,
    encode_row,
    encode_rows,
    share_of,
)
from cpm_cluster.training.tokenizer import load_tokenizer

BYTES = load_tokenizer("bytes")
lengths = st.lists(st.integers(2, 17), min_size=1, max_size=40)


def sample_of(length: int, mark: int = 5) -> Sample:
    return Sample(array("i", [1] + [mark] * (length - 2) + [2]), 1)


def test_rows_are_read_in_order_from_all_files(tmp_path):
    for name in "ab":
        row = {"input": "", "output": name, "source": "more keys do no harm"}
        (tmp_path / name).write_text(json.dumps(row) + "\n")

    rows = read_rows([str(tmp_path / "b"), str(tmp_path / "a")], "train")

    assert rows == [Row("", "b"), Row("", "a")]


def test_every_problem_is_reported_by_file_and_line(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"input": "", "output": "x"}\n[]\n\xff\n\n{"input": "", "output": ""}\n{"output": "x"}\n')
    (tmp_path / "empty.jsonl").touch()

    with pytest.raises(UserError) as caught:
        read_rows([str(path), str(tmp_path / "empty.jsonl"), str(tmp_path / "absent.jsonl")], "train")

    message = str(caught.value)
    assert "7 problem(s)" in message
    expected = [
        "2: is not an object",
        "3: is not UTF-8",
        "4: is not JSON",
        '5: "output" is empty',
        '6: has no "input"',
    ]
    for problem in expected:
        assert f"{path}:{problem}" in message
    assert "empty.jsonl: is empty" in message
    assert "absent.jsonl: cannot be read: No such file" in message


def test_a_thousand_problems_are_counted_not_listed(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text("nonsense\n" * 1000)

    with pytest.raises(UserError, match="1000 problem.*and 980 more") as caught:
        read_rows([str(path)], "train")

    assert len(str(caught.value)) < 5000


def test_the_built_in_corpus_keeps_evaluation_text_out_of_training():
    train, held_out = (read_rows([PYTHON_REFERENCE], use) for use in ("train", "eval"))

    def paragraphs(rows):
        return {paragraph for row in rows for paragraph in row.output.split("\n")}

    assert not paragraphs(train) & paragraphs(held_out)
    assert 0.02 < len(held_out) / len(train) < 0.1
    assert sum(len(row.output) for row in train) > 200_000
    assert train == read_rows([PYTHON_REFERENCE], "train")


def test_the_loss_is_on_the_answer_and_the_end():
    sample = encode_row(Row("hi", "yo"), BYTES)
    batch = collate([[sample]], 32)

    assert BYTES.decode(sample.ids) == "<用户>hi<AI>yo"
    assert BYTES.decode(batch.targets[0][batch.targets[0] != IGNORED].tolist()) == "yo"
    assert batch.target_tokens == 3
    assert batch.tokens == len(sample.ids) - 1


def test_without_an_input_the_loss_is_on_everything():
    batch = collate([[encode_row(Row("", "yo"), BYTES)]], 8)

    assert batch.targets[0].tolist() == [*BYTES.encode("yo"), 2] + [IGNORED] * 5
    assert batch.input_ids[0].tolist()[:3] == [1, *BYTES.encode("yo")]


def test_packed_documents_keep_their_own_positions_and_targets():
    batch = collate([[sample_of(4, 5), sample_of(3, 6)]], 7)

    assert batch.input_ids[0].tolist() == [1, 5, 5, 1, 6, 0, 0]
    assert batch.targets[0].tolist() == [5, 5, 2, 6, 2, IGNORED, IGNORED]
    assert batch.documents[0].tolist() == [0, 0, 0, 1, 1, -1, -1]
    assert batch.positions[0].tolist() == [0, 1, 2, 0, 1, 0, 0]


def test_too_long_samples_are_dropped_and_counted():
    rows = [Row("", "x" * 7), Row("", "x" * 8)]

    samples, dropped = encode_rows(rows, BYTES, seq_len=8)

    assert (len(samples), dropped) == (1, 1)
    with pytest.raises(UserError, match="none of the 2 samples fits into seq_len 4"):
        encode_rows(rows, BYTES, seq_len=4)


def test_best_fit_fills_the_fullest_row_that_has_room():
    rows = best_fit([sample_of(n + 1) for n in (6, 4, 3, 4, 3)], 10)

    assert [[len(sample.ids) - 1 for sample in row] for row in rows] == [[6, 4], [3, 4, 3]]


@given(lengths)
def test_packing_loses_and_splits_nothing(wanted):
    rows = best_fit([sample_of(length) for length in wanted], 16)

    assert sorted(len(sample.ids) for row in rows for sample in row) == sorted(wanted)
    assert all(sum(len(sample.ids) - 1 for sample in row) <= 16 for row in rows)
    half_empty = [row for row in rows if sum(len(sample.ids) - 1 for sample in row) <= 8]
    assert len(half_empty) <= 1


@given(lengths, st.integers(0, 30), st.integers(1, 9))
def test_a_stream_continues_where_its_position_says(wanted, taken, count):
    samples = [sample_of(length, mark) for mark, length in enumerate(wanted, 3)]
    straight = PackedStream(samples, 16, 1, Position(0, 0))
    straight.take(taken)

    resumed = PackedStream(samples, 16, 1, straight.position)

    assert resumed.take(count) == straight.take(count)


def test_each_epoch_has_every_sample_once_in_another_order():
    samples = [sample_of(9, mark) for mark in range(3, 23)]
    stream = PackedStream(samples, 8, 1, Position(0, 0))

    first, second = stream.take(20), stream.take(20)

    assert first != second
    assert sorted(row[0].ids[1] for row in first) == sorted(row[0].ids[1] for row in second) == list(range(3, 23))


@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 4))
def test_ranks_share_rows_evenly_and_completely(count, world_size, per_batch):
    rows = [[sample_of(3, mark)] for mark in range(3, 3 + count)]

    shares = [share_of(rows, rank, world_size, per_batch) for rank in range(world_size)]

    assert len({len(share) for share in shares}) == 1
    assert all(len(group) == per_batch for share in shares for group in share)
    dealt = [row for share in shares for group in share for row in group if row]
    assert sorted(dealt) == sorted(rows)


def test_a_padding_row_counts_nothing():
    batch = collate([[], [sample_of(3)]], 4)

    assert (batch.tokens, batch.target_tokens) == (2, 2)
    assert torch.all(batch.targets[0] == IGNORED)
