"""The data of a run as batches: what ``run.py`` asks for, on this rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Iterator, Mapping, NamedTuple, Sequence

import numpy as np

from cpm_cluster.training.data.corpus import Use
from cpm_cluster.training.data.mixture import Mixture
from cpm_cluster.training.data.packing import Batch, PackedRow, PackedStream, Position, best_fit, collate, share_of
from cpm_cluster.training.data.token_index import Ranks, Samples, open_samples
from cpm_cluster.training.data.tokenizer import Tokenizer
from cpm_cluster.training.errors import UserError
from cpm_cluster.training.placement import Placement
from cpm_cluster.training.settings import Settings


class TrainingData:
    """Training batches without end, which any attempt and any number of ranks continues in the same order."""

    def __init__(self, settings: Settings, tokenizer: Tokenizer, ranks: Ranks, say: Callable[[str], None]) -> None:
        """Read, check and encode the training data. Collective; raises what :func:`open_samples` does."""
        self._training, self._placement = settings.training, ranks.placement
        self.samples = open_samples(settings, "train", tokenizer, ranks)
        say(described(self.samples, "train", settings))
        weights = [source.weight for source in settings.data.train if source.weight is not None]
        sizes = self.samples.summary.per_source
        self._mixture = Mixture(sizes, weights or None, settings.seed)
        if weights:
            say(self._mixture_described([source.path for source in settings.data.train]))
        # Weights, what they are of, and seed, too: together they say which row follows which.
        weighted = f"{weights} of {sizes}" if weights else "[]"
        self._data = f"{self.samples.summary.fingerprint} seed {settings.seed} weights {weighted}"
        self._stream = self._stream_from(Position(self._data, 0, 0))

    def _mixture_described(self, paths: Sequence[str]) -> str:
        """Return a line for people: what weights, which count samples, come to in tokens and in repetition."""
        sizes, shares = self.samples.summary.per_source, self._mixture.shares
        starts = np.cumsum([0, *sizes[:-1]])
        lengths = np.add.reduceat(self.samples.inputs, starts, dtype=np.int64) / sizes
        tokens = lengths * shares / (lengths * shares).sum()
        passes = np.array(shares) * sum(sizes) / sizes
        of_sources = [
            f"{name} {of_tokens:.1%} of the tokens, {times:.2f} passes an epoch"
            for name, of_tokens, times in zip(short_names(paths), tokens, passes)
        ]
        return "mixture: " + "; ".join(of_sources)

    @property
    def position(self) -> Mapping[str, Any]:
        """Where the stream stands, as a JSON object."""
        return self._stream.position._asdict()

    @property
    def epoch(self) -> int:
        """The epoch (from 0) of the row that comes next."""
        return self._mixture.epoch_of(self._stream.position.window)

    def seek(self, position: Mapping[str, Any]) -> None:
        """Continue at a position that an earlier attempt left; an empty one is the start.

        Raises UserError when it is one in other data: the run would see some samples twice and others never.
        """
        if not position:
            return
        wanted = Position(**position)
        if wanted.data != self._data:
            raise UserError(
                "the training data (files, weights, tokenizer, seq_len or seed) are not those of the checkpoint;"
                " restore them, or start a run of its own with init_from"
            )
        self._stream = self._stream_from(wanted)

    def _stream_from(self, position: Position) -> PackedStream:
        return PackedStream(self._mixture, self.samples.inputs, self._training.seq_len, position)

    def next_batches(self) -> list[Batch]:
        """Return this rank's micro batches of the next step."""
        training, placement = self._training, self._placement
        rows = self._stream.take(placement.world_size * training.grad_accum * training.micro_batch)
        groups = share_of(rows, placement.rank, placement.world_size, training.micro_batch)
        return [collate_samples(self.samples, group, training.seq_len) for group in groups]


class EvalBatches:
    """This rank's batches of some of the evaluation data, every sample once; made when asked for."""

    def __init__(self, samples: Samples, numbers: range, settings: Settings, placement: Placement) -> None:
        """Pack the samples of those numbers; every rank gets the same number of batches."""
        training = settings.training
        rows = best_fit(samples.inputs[numbers.start : numbers.stop].tolist(), training.seq_len)
        self._samples, self._first, self._seq_len = samples, numbers.start, training.seq_len
        self._groups = share_of(rows, placement.rank, placement.world_size, training.micro_batch)

    def __len__(self) -> int:
        return len(self._groups)

    def __iter__(self) -> Iterator[Batch]:
        for group in self._groups:
            rows = [[self._first + index for index in row] for row in group]
            yield collate_samples(self._samples, rows, self._seq_len)


class EvalSource(NamedTuple):
    """One source of the evaluation data: a short name of its own, its targets on all ranks, this rank's batches."""

    name: str
    targets: int
    batches: EvalBatches


def evaluation_sources(
    settings: Settings, tokenizer: Tokenizer, ranks: Ranks, say: Callable[[str], None]
) -> list[EvalSource]:
    """Read, check and encode the evaluation data. Collective; raises what :func:`open_samples` does."""
    samples = open_samples(settings, "eval", tokenizer, ranks)
    say(described(samples, "eval", settings))
    names = short_names([source.path for source in settings.data.eval])
    ends = np.cumsum([0, *samples.summary.per_source]).tolist()
    return [
        EvalSource(
            name,
            int(samples.targets[begin:end].sum(dtype=np.int64)),
            EvalBatches(samples, range(begin, end), settings, ranks.placement),
        )
        for name, begin, end in zip(names, ends, ends[1:])
    ]


def short_names(paths: Sequence[str]) -> list[str]:
    """Return the names of files without folder and suffix; where those are not distinct, the paths."""
    stems = [Path(path).stem for path in paths]
    return stems if len(set(stems)) == len(stems) else list(paths)


def collate_samples(samples: Samples, rows: Sequence[PackedRow], seq_len: int) -> Batch:
    """Fetch the samples of packed rows and lay them out."""
    return collate([[samples[number] for number in row] for row in rows], seq_len)


def described(samples: Samples, use: Use, settings: Settings) -> str:
    """Return a line for people: how much there is, and what was left out."""
    has = samples.summary
    line = f"{use} data: {len(samples)} samples of {has.tokens} tokens"
    if has.dropped:
        seq_len = settings.training.seq_len
        line += f"; {has.dropped} of {has.rows} samples are longer than {seq_len} tokens and were dropped"
    return line
