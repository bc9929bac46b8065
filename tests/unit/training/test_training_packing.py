"""Samples as rows and rows as tensors: what carries loss, best fit, and each rank's share."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_runs import encode_row, paired

from cpm_cluster.training.data.corpus import Row
from cpm_cluster.training.data.mixture import Mixture
from cpm_cluster.training.data.packing import (
    IGNORED,
    PackedStream,
    Position,
    Sample,
    best_fit,
    collate,
    encode_rows,
    share_of,
)
from cpm_cluster.training.data.tokenizer import load_tokenizer

BYTES = load_tokenizer("bytes")
START = Position("", 0, 0)
lengths = st.lists(st.integers(1, 16), min_size=1, max_size=60)


def sample_of(length: int, mark: int = 5) -> Sample:
    return Sample(np.array([1] + [mark] * (length - 2) + [2]), 1)


def stream_of(inputs: list[int], position: Position = START, window: int = 7, seed: int = 1) -> PackedStream:
    return PackedStream(Mixture([len(inputs)], None, seed, window), np.array(inputs, "i4"), 16, position)


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


def test_rows_encoded_together_are_those_encoded_alone():
    rows = [Row("", "a"), Row("who?", "b"), Row("", "c"), Row("why?", "d")]

    together = encode_rows(rows, BYTES)

    for row, sample in paired(rows, together):
        alone = encode_row(row, BYTES)
        assert sample.ids.tolist() == alone.ids.tolist() and sample.loss_from == alone.loss_from


def test_packed_documents_keep_their_own_positions_and_targets():
    batch = collate([[sample_of(4, 5), sample_of(3, 6)]], 7)

    assert batch.input_ids[0].tolist() == [1, 5, 5, 1, 6, 0, 0]
    assert batch.targets[0].tolist() == [5, 5, 2, 6, 2, IGNORED, IGNORED]
    assert batch.documents[0].tolist() == [0, 0, 0, 1, 1, -1, -1]
    assert batch.positions[0].tolist() == [0, 1, 2, 0, 1, 0, 0]


def test_a_batch_has_the_types_that_the_model_takes():
    batch = collate([[Sample(np.array([1, 65000, 2], dtype="u2"), 1)]], 4)

    assert {tensor.dtype for tensor in (batch.input_ids, batch.targets, batch.documents, batch.positions)} == {
        torch.int64
    }
    assert batch.input_ids[0].tolist() == [1, 65000, 0, 0]


def test_a_padding_row_counts_nothing():
    batch = collate([[], [sample_of(3)]], 4)

    assert (batch.tokens, batch.target_tokens) == (2, 2)
    assert torch.all(batch.targets[0] == IGNORED)


def test_best_fit_fills_the_fullest_row_that_has_room():
    assert best_fit([6, 4, 3, 4, 3], 10) == [[0, 1], [2, 3, 4]]


@given(lengths)
def test_packing_loses_and_splits_nothing(inputs):
    rows = best_fit(inputs, 16)

    assert sorted(index for row in rows for index in row) == list(range(len(inputs)))
    filled = [sum(inputs[index] for index in row) for row in rows]
    assert max(filled) <= 16
    assert sum(tokens <= 8 for tokens in filled) <= 1


@settings(max_examples=40, deadline=None)
@given(lengths, st.integers(0, 60), st.integers(1, 9))
def test_a_stream_continues_where_its_position_says(inputs, taken, count):
    straight = stream_of(inputs)
    straight.take(taken)

    resumed = stream_of(inputs, straight.position)

    assert resumed.take(count) == straight.take(count)
    assert resumed.position == straight.position


@settings(max_examples=40, deadline=None)
@given(lengths, st.lists(st.integers(1, 9), max_size=8))
def test_rows_do_not_depend_on_how_many_are_taken_at_once(inputs, counts):
    at_once, by_and_by = stream_of(inputs), stream_of(inputs)

    assert at_once.take(sum(counts)) == [row for count in counts for row in by_and_by.take(count)]


@pytest.mark.parametrize("window", [7, 20, 1000])
def test_each_epoch_has_every_sample_once_in_another_order(window):
    stream = stream_of([16] * 20, window=window)

    first, second = ([number for (number,) in stream.take(20)] for _ in range(2))

    assert first != second
    assert sorted(first) == sorted(second) == list(range(20))


def test_another_seed_is_another_order():
    assert stream_of([16] * 20).take(20) == stream_of([16] * 20).take(20) != stream_of([16] * 20, seed=2).take(20)


@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 4))
def test_ranks_share_rows_evenly_and_completely(count, world_size, per_batch):
    rows = [[number] for number in range(count)]

    shares = [share_of(rows, rank, world_size, per_batch) for rank in range(world_size)]

    assert len({len(share) for share in shares}) == 1
    assert all(len(group) == per_batch for share in shares for group in share)
    dealt = [row for share in shares for group in share for row in group if row]
    assert sorted(dealt) == rows
