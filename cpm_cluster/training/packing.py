"""From rows of text to batches of packed rows: best fit, documents kept apart, nothing depends on the rank.

Every rank packs the same rows in the same order and takes its share, so that the order is a function of the
seed and the epoch alone, a position is two numbers, and no rank can run out of data before another.
"""

from __future__ import annotations

import random
from array import array
from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import NamedTuple, Sequence

import torch
from torch import Tensor

from cpm_cluster.training.corpus import Row
from cpm_cluster.training.errors import UserError
from cpm_cluster.training.tokenizer import Tokenizer

IGNORED = -100
PROMPT = "<用户>{}<AI>"


class Sample(NamedTuple):
    """One document: ``<s>`` prompt output ``</s>``; tokens before ``loss_from`` are not targets."""

    ids: array[int]
    loss_from: int


class Position(NamedTuple):
    """Where a stream stands: packed rows of this epoch taken so far."""

    epoch: int
    row: int


@dataclass(frozen=True)
class Batch:
    """B packed rows of T tokens, each tensor int64 [B, T].

    ``targets`` holds the next token of the same document or IGNORED; padding is a document of its own.
    ``tokens`` counts the inputs that are not padding, ``target_tokens`` those that carry loss.
    """

    input_ids: Tensor
    targets: Tensor
    documents: Tensor
    positions: Tensor
    tokens: int
    target_tokens: int


def encode_rows(rows: Sequence[Row], tokenizer: Tokenizer, seq_len: int) -> tuple[list[Sample], int]:
    """Return the samples that fit into ``seq_len`` inputs, and how many were dropped because they do not.

    Raises UserError when nothing is left.
    """
    samples = [encode_row(row, tokenizer) for row in rows]
    fitting = [sample for sample in samples if len(sample.ids) - 1 <= seq_len]
    if not fitting:
        raise UserError(f"none of the {len(samples)} samples fits into seq_len {seq_len} tokens")
    return fitting, len(samples) - len(fitting)


def encode_row(row: Row, tokenizer: Tokenizer) -> Sample:
    """Wrap the input as CPM's prompt; the loss is on output and ``</s>``, without an input on everything."""
    prompt = tokenizer.encode(PROMPT.format(row.input)) if row.input else []
    ids = [tokenizer.bos, *prompt, *tokenizer.encode(row.output), tokenizer.eos]
    return Sample(array("i", ids), 1 + len(prompt))


def best_fit(samples: Sequence[Sample], seq_len: int) -> list[list[Sample]]:
    """Put each sample, in order, into the fullest row that still has room (best-fit bin packing)."""
    rows: list[list[Sample]] = []
    room: list[tuple[int, int]] = []
    for sample in samples:
        needed = len(sample.ids) - 1
        index = bisect_left(room, (needed, -1))
        free, row = room.pop(index) if index < len(room) else (seq_len, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(sample)
        if free > needed:
            insort(room, (free - needed, row))
    return rows


class PackedStream:
    """Packed rows without end, reshuffled and repacked each epoch."""

    def __init__(self, samples: Sequence[Sample], seq_len: int, seed: int, position: Position) -> None:
        self._samples = samples
        self._seq_len = seq_len
        self._seed = seed
        self.position = position
        self._rows = self._pack(position.epoch)

    def take(self, count: int) -> list[list[Sample]]:
        """Return the next ``count`` rows and move on, into the next epoch where this one ends."""
        taken: list[list[Sample]] = []
        epoch, row = self.position
        while len(taken) < count:
            if row >= len(self._rows):
                epoch, row = epoch + 1, 0
                self._rows = self._pack(epoch)
            part = self._rows[row : row + count - len(taken)]
            taken.extend(part)
            row += len(part)
        self.position = Position(epoch, row)
        return taken

    def _pack(self, epoch: int) -> list[list[Sample]]:
        order = random.Random(f"{self._seed}-{epoch}")
        samples = list(self._samples)
        order.shuffle(samples)
        rows = best_fit(samples, self._seq_len)
        # Best fit leaves the emptiest rows last; an epoch should not end on them.
        order.shuffle(rows)
        return rows


def share_of(rows: Sequence[list[Sample]], rank: int, world_size: int, per_batch: int) -> list[list[list[Sample]]]:
    """Return one rank's rows in groups of ``per_batch``; every rank gets the same number of groups."""
    padded = list(rows)
    padded.extend([] for _ in range(-len(rows) % (world_size * per_batch)))
    own = padded[rank::world_size]
    return [own[start : start + per_batch] for start in range(0, len(own), per_batch)]


def collate(rows: Sequence[Sequence[Sample]], seq_len: int) -> Batch:
    """Lay packed rows out as tensors [len(rows), seq_len]."""
    shape = (len(rows), seq_len)
    input_ids = torch.zeros(shape, dtype=torch.int64)
    targets = torch.full(shape, IGNORED, dtype=torch.int64)
    documents = torch.full(shape, -1, dtype=torch.int64)
    positions = torch.zeros(shape, dtype=torch.int64)
    tokens = 0
    for row, samples in enumerate(rows):
        start = 0
        for document, sample in enumerate(samples):
            ids = torch.tensor(sample.ids, dtype=torch.int64)
            end = start + len(ids) - 1
            input_ids[row, start:end] = ids[:-1]
            targets[row, start + sample.loss_from - 1 : end] = ids[sample.loss_from :]
            documents[row, start:end] = document
            positions[row, start:end] = torch.arange(end - start)
            start = end
        tokens += start
    return Batch(input_ids, targets, documents, positions, tokens, int((targets != IGNORED).sum()))
