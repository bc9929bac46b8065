"""Sampling: repeatable, ends at the end token, calls a collective forward equally often on every rank."""

from __future__ import annotations

import torch

from cpm_cluster.training.generate import continue_text, draw
from cpm_cluster.training.tokenizer import load_tokenizer

BYTES = load_tokenizer("bytes")


def always(*texts_or_ids):
    """Return a model that prefers the given tokens in turn, and a list that counts its calls."""
    wanted = [BYTES.encode(item)[0] if isinstance(item, str) else item for item in texts_or_ids]
    calls: list[list[int]] = []

    def logits(ids):
        calls.append(list(ids))
        result = torch.zeros(BYTES.size)
        result[wanted[min(len(calls), len(wanted)) - 1]] = 50.0
        return result

    return logits, calls


def test_the_model_continues_the_prompt():
    logits, calls = always("y", "o", BYTES.eos)

    assert continue_text(logits, BYTES, "hi", 3, 0.8, seed=1) == "yo"
    assert calls[0] == [1, *BYTES.encode("hi")]
    assert calls[2] == [1, *BYTES.encode("hiyo")]


def test_the_forward_is_called_max_tokens_times_even_after_the_end():
    logits, calls = always(BYTES.eos)

    assert continue_text(logits, BYTES, "hi", 5, 0.8, seed=1) == ""
    assert len(calls) == 5


def test_equal_seeds_draw_equal_texts():
    def flat(ids):
        return torch.zeros(BYTES.size)

    first, again, other = (continue_text(flat, BYTES, "", 20, 1.0, seed) for seed in (1, 1, 2))

    assert first == again != other


def test_unlikely_tokens_are_never_drawn():
    logits = torch.log(torch.tensor([0.6, 0.37, 0.02, 0.01]))
    generator = torch.Generator().manual_seed(0)

    drawn = [draw(logits, 1.0, generator) for _ in range(2000)]

    assert set(drawn) == {0, 1}
    assert 0.57 < drawn.count(0) / 2000 < 0.67


def test_temperature_zero_takes_the_best():
    generator = torch.Generator().manual_seed(0)

    assert {draw(torch.tensor([1.0, 1.1, 0.9]), 0, generator) for _ in range(20)} == {1}
