"""Sampling: repeatable, ends at the end token, calls a collective forward equally often on every rank."""

from __future__ import annotations

import pytest
import torch

from cpm_cluster.training.data.tokenizer import load_tokenizer
from cpm_cluster.training.inference.sampling import continue_text, draw

BYTES = load_tokenizer("bytes")
EVENLY = [number / 2000 for number in range(2000)]


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


def drawn(probabilities: list[float], numbers: list[float], temperature: float = 1.0, top_p: float = 0.95) -> list[int]:
    """Draw once for each number from a distribution."""
    return draw(torch.log(torch.tensor([probabilities] * len(numbers))), temperature, top_p, numbers)


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


def test_the_likeliest_that_hold_top_p_are_drawn_in_proportion_and_others_never():
    tokens = drawn([0.01, 0.37, 0.02, 0.6], EVENLY)

    assert set(tokens) == {1, 3}
    assert tokens.count(3) / 2000 == pytest.approx(0.6 / 0.97, abs=0.001)
    assert set(drawn([0.01, 0.37, 0.02, 0.6], EVENLY, top_p=1.0)) == {0, 1, 2, 3}
    assert set(drawn([0.01, 0.37, 0.02, 0.6], EVENLY, top_p=1e-9)) == {3}


def test_a_lower_temperature_prefers_the_best():
    cold, warm = (drawn([0.4, 0.6], EVENLY, temperature, 1.0).count(1) / 2000 for temperature in (0.5, 1.0))

    assert cold == pytest.approx(0.36 / 0.52, abs=0.001) and warm == pytest.approx(0.6, abs=0.001)


def test_a_number_next_to_1_draws_none_of_those_that_are_left_out():
    assert drawn([0.5, 0.46, 0.04], [1 - 2**-53]) == [1]


def test_temperature_zero_takes_the_best_of_each_row():
    assert draw(torch.tensor([[1.0, 1.1, 0.9], [2.0, 1.1, 0.9]]), 0, 0.95, [0.9, 0.9]) == [1, 0]


def test_what_is_drawn_for_a_row_does_not_depend_on_its_companions():
    torch.manual_seed(0)
    logits = torch.randn(5, 40)

    together = draw(logits, 1.0, 0.9, [0.1, 0.3, 0.5, 0.7, 0.9])

    assert together == [draw(logits[row : row + 1], 1.0, 0.9, [0.1 + 0.2 * row])[0] for row in range(5)]


def test_a_deterministic_run_draws_the_same(monkeypatch):
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)

    assert set(drawn([0.01, 0.37, 0.02, 0.6], EVENLY)) == {1, 3}
