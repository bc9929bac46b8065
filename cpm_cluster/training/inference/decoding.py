"""Continuing several prompts at once, with a cache of keys and values."""

from __future__ import annotations

from typing import Callable, NamedTuple, Protocol, Sequence

import torch
from torch import Tensor

from cpm_cluster.training.model.attention import KeyValueCache

# Draws a token for each row of logits [B, vocab]; rows that have ended are drawn, too, and not looked at.
Choose = Callable[[Tensor], Sequence[int]]


class Forward(Protocol):
    """The model: ids, documents and positions [B, Q] that continue a cache, to logits [B, 1, vocab]."""

    def __call__(self, input_ids: Tensor, documents: Tensor, positions: Tensor, cache: KeyValueCache) -> Tensor:
        """Return the logits of the last tokens."""


class Continued(NamedTuple):
    """The tokens drawn after a prompt, without the end token; whether that came, or the limit."""

    ids: list[int]
    ended: bool


class Continuation:
    """B prompts and what has been drawn for each; rows that have ended run along until all have.

    Shorter prompts are padded on the left, so that the next token of each is in one column. Padding is a document of
    its own: no token of a prompt sees it, and positions count from the prompt's first token.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], limits: Sequence[int], end: int, device: torch.device) -> None:
        """Every prompt has a token, and a limit of at least 1."""
        longest = max(len(prompt) for prompt in prompts)
        padding = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)[:, None]
        columns = torch.arange(longest, device=device)[None]
        padded = [[end] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        self._next = (
            torch.tensor(padded, device=device),
            torch.where(columns < padding, -1, 0),
            (columns - padding).clamp_(min=0),
        )
        self._cache = KeyValueCache(longest + max(limits))
        self._limits, self._end = limits, end
        self._drawn: list[list[int]] = [[] for _ in prompts]
        self._ended = [False] * len(prompts)

    @property
    def running(self) -> bool:
        """Whether a row has neither ended nor reached its limit."""
        return any(self._runs(row) for row in range(len(self._drawn)))

    def step(self, forward: Forward, choose: Choose) -> None:
        """Draw one more token for each row that runs."""
        logits = forward(*self._next, self._cache)[:, -1]
        tokens = choose(logits)
        for row, token in enumerate(tokens):
            if self._runs(row):
                self._ended[row] = token == self._end
                if not self._ended[row]:
                    self._drawn[row].append(token)
        _, documents, positions = self._next
        ids = torch.tensor(tokens, device=documents.device)[:, None]
        self._next = (ids, torch.zeros_like(ids), positions[:, -1:] + 1)

    def results(self) -> list[Continued]:
        """Return what was drawn for each prompt."""
        return [Continued(drawn, ended) for drawn, ended in zip(self._drawn, self._ended)]

    def _runs(self, row: int) -> bool:
        return not self._ended[row] and len(self._drawn[row]) < self._limits[row]


def continue_together(
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    end: int,
    device: torch.device,
    forward: Forward,
    choose: Choose,
    any_rank: Callable[[bool], bool],
) -> list[Continued]:
    """Continue the prompts, of which there may be none, to their ends or limits.

    Where a forward pass is collective, ``any_rank`` tells whether a rank still has something to do: all ranks call
    ``forward`` equally often, those that are done with a token of no meaning. Elsewhere it returns what it is given.
    """
    batch = Continuation(prompts, limits, end, device) if prompts else None
    while any_rank(batch is not None and batch.running):
        if batch is not None and batch.running:
            batch.step(forward, choose)
        else:
            nothing = torch.zeros((1, 1), dtype=torch.int64, device=device)
            forward(nothing, nothing, nothing, KeyValueCache(1))
    return batch.results() if batch is not None else []
