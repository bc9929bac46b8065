"""Drawing tokens: nucleus sampling that depends on the logits and one number between 0 and 1."""

from __future__ import annotations

import random
from typing import Callable, Sequence

import torch
from torch import Tensor

from cpm_cluster.training.data.tokenizer import Tokenizer

_TOP_P = 0.95


def continue_text(
    next_token_logits: Callable[[Sequence[int]], Tensor],
    tokenizer: Tokenizer,
    prompt: str,
    max_tokens: int,
    temperature: float,
    seed: int,
) -> str:
    """Return what the model writes after ``<s>`` and the prompt, up to ``</s>`` or ``max_tokens``.

    ``next_token_logits`` maps the ids so far to logits [vocab] and may be collective: it is called exactly
    ``max_tokens`` times on every rank, whatever is drawn. Equal seeds give equal texts.
    """
    numbers = random.Random(seed)
    prompt_ids = [tokenizer.bos, *tokenizer.encode(prompt)]
    drawn: list[int] = []
    for _ in range(max_tokens):
        logits = next_token_logits(prompt_ids + drawn)
        drawn.extend(draw(logits[None], temperature, _TOP_P, [numbers.random()]))
    if tokenizer.eos in drawn:
        drawn = drawn[: drawn.index(tokenizer.eos)]
    return tokenizer.decode(drawn)


def draw(logits: Tensor, temperature: float, top_p: float, numbers: Sequence[float]) -> list[int]:
    """Draw a token for each row of logits [B, vocab] with its own number in [0, 1); temperature 0 takes the best.

    Nucleus sampling (Holtzman et al. 2020, §3.1): the likeliest tokens that hold ``top_p`` between them, of which the
    number picks one as it cuts their cumulated probability. Equal numbers draw equal tokens, whatever else is drawn.
    """
    if temperature == 0:
        return [int(token) for token in logits.argmax(dim=-1)]
    if torch.are_deterministic_algorithms_enabled():
        logits = logits.cpu()  # cumsum has no deterministic kernel on a GPU
    probabilities, order = torch.softmax(logits.float() / temperature, dim=-1).sort(
        dim=-1, descending=True, stable=True
    )
    # A token stays while those before it hold less than p, so the best always stays.
    stays = probabilities.cumsum(dim=-1) - probabilities < top_p
    kept = (probabilities * stays).cumsum(dim=-1)
    cut = kept[:, -1:] * torch.tensor(numbers, dtype=kept.dtype, device=kept.device)[:, None]
    # A number next to 1 may be rounded to 1, which is beyond the last that stays.
    picked = torch.minimum(torch.searchsorted(kept, cut, right=True), stays.sum(dim=-1, keepdim=True) - 1)
    return [int(token) for token in order.gather(-1, picked)[:, 0].tolist()]
