"""Sampling from the model, before and after training."""

from __future__ import annotations

from typing import Callable, Sequence

import torch
from torch import Tensor

from cpm_cluster.training.tokenizer import Tokenizer

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
    generator = torch.Generator().manual_seed(seed)
    prompt_ids = [tokenizer.bos, *tokenizer.encode(prompt)]
    drawn: list[int] = []
    for _ in range(max_tokens):
        drawn.append(draw(next_token_logits(prompt_ids + drawn), temperature, generator))
    if tokenizer.eos in drawn:
        drawn = drawn[: drawn.index(tokenizer.eos)]
    return tokenizer.decode(drawn)


def draw(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    """Draw a token from logits [vocab]; temperature 0 takes the best.

    Nucleus sampling with p = 0.95 (Holtzman et al. 2020, §3.1).
    """
    if temperature == 0:
        return int(logits.argmax())
    probabilities, order = torch.softmax(logits.float() / temperature, dim=-1).sort(descending=True)
    # A token stays while those before it hold less than p, so the best always stays.
    probabilities[probabilities.cumsum(-1) - probabilities >= _TOP_P] = 0.0
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])
