"""From samples to batches of packed rows: best fit, documents kept apart, nothing depends on the rank.

Every rank packs the same samples in the same order and takes its share, so that the order is a function of the
seed alone, a position is two numbers, and no rank can run out of data before another. Packing looks at lengths
only; the ids of a row are fetched by the rank that trains on it.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import List, NamedTuple, Sequence, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cpm_cluster.training.data.corpus import Row
from cpm_cluster.training.data.mixture import Mixture
from cpm_cluster.training.data.tokenizer import Tokenizer

IGNORED = -100
PROMPT = "<用户>{}<AI>"

T = TypeVar("T")
# The numbers of the samples that share a row.
PackedRow = List[int]


class Sample(NamedTuple):
    """One document: ``<s>`` prompt output ``</s>`` (ids [n]); tokens before ``loss_from`` are not targets."""

    ids: npt.NDArray[np.integer]
    loss_from: int


class Position(NamedTuple):
    """Where a stream stands: packed rows taken so far of a window, and which data these are the windows of."""

    data: str
    window: int
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


def encode_rows(rows: Sequence[Row], tokenizer: Tokenizer) -> list[Sample]:
    """Wrap each input as CPM's prompt; the loss is on output and ``</s>``, without an input on everything.

    Many at once, because some tokenizers encode them side by side.
    """
    prompts = iter(tokenizer.encode_many([PROMPT.format(row.input) for row in rows if row.input]))
    outputs = tokenizer.encode_many([row.output for row in rows])
    samples = []
    for row, output in zip(rows, outputs):
        prompt = next(prompts) if row.input else []
        ids = np.array([tokenizer.bos, *prompt, *output, tokenizer.eos], dtype=np.int64)
        samples.append(Sample(ids, 1 + len(prompt)))
    return samples


def best_fit(inputs: Sequence[int], seq_len: int) -> list[PackedRow]:
    """Put each sample, in order, into the fullest row that still has room (best-fit bin packing).

    ``inputs`` are the lengths of the samples, each at most ``seq_len``; rows hold indices into it.
    """
    rows: list[PackedRow] = []
    room: list[tuple[int, int]] = []
    for index, needed in enumerate(inputs):
        found = bisect_left(room, (needed, -1))
        free, row = room.pop(found) if found < len(room) else (seq_len, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
        if free > needed:
            insort(room, (free - needed, row))
    return rows


class PackedStream:
    """Packed rows without end, window after window of a mixture."""

    def __init__(self, mixture: Mixture, inputs: npt.NDArray[np.int32], seq_len: int, position: Position) -> None:
        """Continue at a position; ``inputs`` [samples] are the lengths of all samples."""
        self._mixture = mixture
        self._inputs = inputs
        self._seq_len = seq_len
        self.position = position
        self._rows = self._pack(position.window)

    def take(self, count: int) -> list[PackedRow]:
        """Return the next ``count`` rows and move on, into the next window where this one ends."""
        taken: list[PackedRow] = []
        data, window, row = self.position
        while len(taken) < count:
            if row >= len(self._rows):
                window, row = window + 1, 0
                self._rows = self._pack(window)
            part = self._rows[row : row + count - len(taken)]
            taken.extend(part)
            row += len(part)
        self.position = Position(data, window, row)
        return taken

    def _pack(self, window: int) -> list[PackedRow]:
        samples = self._mixture.window(window)
        numbers = samples.tolist()
        rows = best_fit(self._inputs[samples].tolist(), self._seq_len)
        # Best fit leaves the emptiest rows last; a window should not end on them.
        order = self._mixture.generator("rows", window).permutation(len(rows)).tolist()
        return [[numbers[index] for index in rows[row]] for row in order]


def share_of(rows: Sequence[list[T]], rank: int, world_size: int, per_batch: int) -> list[list[list[T]]]:
    """Return one rank's rows in groups of ``per_batch``; every rank gets the same number of groups."""
    padded = list(rows)
    padded.extend([] for _ in range(-len(rows) % (world_size * per_batch)))
    own = padded[rank::world_size]
    return [own[start : start + per_batch] for start in range(0, len(own), per_batch)]


def collate(rows: Sequence[Sequence[Sample]], seq_len: int) -> Batch:
    """Lay packed rows out as tensors [len(rows), seq_len]."""
    shape = (len(rows), seq_len)
    input_ids = np.zeros(shape, dtype=np.int64)
    targets = np.full(shape, IGNORED, dtype=np.int64)
    documents = np.full(shape, -1, dtype=np.int64)
    positions = np.zeros(shape, dtype=np.int64)
    counting = np.arange(seq_len)
    tokens = 0
    for row, samples in enumerate(rows):
        start = 0
        for document, (ids, loss_from) in enumerate(samples):
            end = start + len(ids) - 1
            input_ids[row, start:end] = ids[:-1]
            targets[row, start + loss_from - 1 : end] = ids[loss_from:]
            documents[row, start:end] = document
            positions[row, start:end] = counting[: end - start]
            start = end
        tokens += start
    return Batch(
        torch.from_numpy(input_ids),
        torch.from_numpy(targets),
        torch.from_numpy(documents),
        torch.from_numpy(positions),
        tokens,
        int((targets != IGNORED).sum()),
    )
