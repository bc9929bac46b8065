"""Task evaluate: perplexity over ``data.eval``, and multiple-choice questions; the ranks divide the work.

``evaluation.json``: ``perplexity``, a list with an entry for each source and, where there are several, one for all
together; ``choices``, one for each file of questions. Losses are in nats per target token.
"""

from __future__ import annotations

import math
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple, Protocol, Sequence

import numpy as np
import torch
from torch import Tensor

from cpm_cluster.training.attempt import open_tokenizer
from cpm_cluster.training.data.packing import Sample, best_fit, collate, share_of
from cpm_cluster.training.data.token_index import Ranks, open_samples
from cpm_cluster.training.data.tokenizer import Tokenizer
from cpm_cluster.training.files import write_json
from cpm_cluster.training.inference.loaded import Advance, Inference, run_inference
from cpm_cluster.training.inference.multiple_choice import Score, read_choice_files
from cpm_cluster.training.placement import Placement
from cpm_cluster.training.settings import Settings
from cpm_cluster.training.stop import Stopped, StopRequest


class Perplexity(NamedTuple):
    """exp(loss) of a source; ``tokens`` are the targets."""

    source: str
    loss: float
    perplexity: float
    tokens: int


class Numbered(Protocol):
    """Samples by number."""

    def __getitem__(self, number: int, /) -> Sample:
        """Return a sample."""


def evaluate(settings: Settings, placement: Placement, settings_text: bytes) -> str:
    """Evaluate on this rank; return "finished" or "stopped"."""
    return run_inference(settings, placement, settings_text, "scoring", "batches", _evaluate)


def _evaluate(settings: Settings, inference: Inference, stop: StopRequest, advance: Advance) -> str:
    tokenizer, evaluation = open_tokenizer(settings), settings.evaluation
    files = read_choice_files(evaluation.choices, evaluation.shots, settings.seed, tokenizer, settings.training.seq_len)
    try:
        parts = _parts_of_sources(settings, inference, tokenizer, stop, advance) if settings.data.eval else []
        parts += [Part(file.samples, range(len(file.samples)), settings, inference) for file in files]
        inference.build()
        advance.begin(0, sum(len(part.groups) for part in parts))
        losses = [part.losses(inference, stop, advance) for part in parts]
    except Stopped:
        return "stopped"
    measured = zip(settings.data.eval, parts, losses)
    perplexities = [_perplexity(source.path, loss, part.targets) for source, part, loss in measured]
    if len(perplexities) > 1:
        tokens = [row.tokens for row in perplexities]
        total = sum(row.loss * row.tokens for row in perplexities)
        perplexities.append(_perplexity("all", torch.tensor([total]), tokens))
    of_files = losses[len(settings.data.eval) :]
    scores = [file.score((-loss).tolist()) for file, loss in zip(files, of_files)]
    if inference.rank == 0:
        _publish(Path(settings.output_dir), perplexities, scores)
    return "finished"


class Part:
    """Samples that are measured together, packed into rows, of which this rank has its share."""

    def __init__(self, samples: Numbered, numbers: range, settings: Settings, inference: Inference) -> None:
        training = settings.training
        self._samples, self._numbers, self._seq_len = samples, numbers, training.seq_len
        sizes = [(len(ids), loss_from) for ids, loss_from in map(samples.__getitem__, numbers)]
        self.targets = [max(0, length - loss_from) for length, loss_from in sizes]
        rows = best_fit([length - 1 for length, _ in sizes], self._seq_len)
        self.groups = share_of(rows, inference.rank, inference.world_size, training.micro_batch)

    def losses(self, inference: Inference, stop: StopRequest, advance: Advance) -> Tensor:
        """Return the summed loss of each sample, float64 [samples], of all ranks. Collective.

        Raises Stopped when a rank is asked to stop.
        """
        sums = torch.zeros(len(self._numbers), dtype=torch.float64)
        for group in self.groups:
            if inference.any_rank(stop.pending):
                raise Stopped
            packed = [[self._samples[self._numbers[index]] for index in row] for row in group]
            by_token = inference.token_losses(collate(packed, self._seq_len)).double()
            for indices, samples, row in zip(group, packed, by_token):
                ends = accumulate(len(sample.ids) - 1 for sample in samples)
                for index, sample, end in zip(indices, samples, ends):
                    sums[index] = row[end - len(sample.ids) + 1 : end].sum()
            advance.note(advance.done + 1)
        return inference.summed(sums)


def _parts_of_sources(
    settings: Settings, inference: Inference, tokenizer: Tokenizer, stop: StopRequest, advance: Advance
) -> list[Part]:
    ranks = Ranks(inference.placement, inference.all_gather, lambda done, of: advance.alive(), lambda: stop.pending)
    samples = open_samples(settings, "eval", tokenizer, ranks)
    ends = np.cumsum([0, *samples.summary.per_source]).tolist()
    return [Part(samples, range(begin, end), settings, inference) for begin, end in zip(ends, ends[1:])]


def _perplexity(source: str, losses: Tensor, targets: Sequence[int]) -> Perplexity:
    tokens = sum(targets)
    loss = float(losses.sum()) / max(1, tokens)
    # Beyond this, exp is infinite, which JSON does not have.
    return Perplexity(source, loss, math.exp(min(loss, 700.0)), tokens)


def _publish(output_dir: Path, perplexities: Sequence[Perplexity], scores: Sequence[Score]) -> None:
    content = {
        "format": 1,
        "perplexity": [row._asdict() for row in perplexities],
        "choices": [row._asdict() for row in scores],
    }
    write_json(output_dir / "evaluation.json", content)
    print(table(perplexities, scores), flush=True)


def table(perplexities: Sequence[Perplexity], scores: Sequence[Score]) -> str:
    """Return the results as people read them."""
    lines = []
    if perplexities:
        width = max(len("perplexity over"), *(len(row.source) for row in perplexities))
        lines.append(f"{'perplexity over':<{width}}  {'loss':>8}  {'perplexity':>12}  {'tokens':>12}")
        lines += [
            f"{row.source:<{width}}  {row.loss:>8.4f}  {row.perplexity:>12.3f}  {row.tokens:>12,}"
            for row in perplexities
        ]
    if scores:
        width = max(len("multiple choice"), *(len(row.file) for row in scores))
        lines.append(
            f"{'multiple choice':<{width}}  {'accuracy':>16}  {'by length':>9}  {'questions':>9}  {'shots':>5}"
        )
        lines += [
            f"{row.file:<{width}}  {row.accuracy:>7.4f} ± {row.standard_error:.4f}  {row.accuracy_normalised:>9.4f}"
            f"  {row.questions:>9,}  {row.shots:>5}"
            for row in scores
        ]
    return "\n".join(lines)
