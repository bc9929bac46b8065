"""Continuing prompts with a cache: what is computed without one, whatever they are together with."""

from __future__ import annotations

import pytest
import torch
from test_training_attention import Recorder
from tiny_runs import initialise, paired
from torch.nn import functional

from cpm_cluster.training.inference.decoding import Continuation, continue_together
from cpm_cluster.training.model.decoder import CPM

CPU = torch.device("cpu")
END = 2
PROMPTS = [[1, 50, 60, 70, 80, 90, 100], [1, 50], [1], [1, 9, 8, 7, 6]]


@pytest.fixture(params=["grouped", "each its own", "no SDPA", "varlen for the prompts"])
def model(request, tiny_settings, monkeypatch):
    """A model of larger weights than at the start of training, so that tokens matter."""
    if request.param == "no SDPA":
        monkeypatch.delattr(functional, "scaled_dot_product_attention", raising=False)
    torch.manual_seed(0)
    kernel = Recorder().kernels["flash 2.8"] if request.param == "varlen for the prompts" else None
    settings = tiny_settings(**{"model.kv_heads": 4 if request.param == "each its own" else 2}).model
    model = CPM(settings, kernel=kernel)
    initialise(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3)
    return model.requires_grad_(False)


def without_cache(model, ids: list[int]) -> torch.Tensor:
    """Logits [vocab] after one document."""
    row = torch.tensor([ids])
    return model(row, torch.zeros_like(row), torch.arange(len(ids))[None])[0, -1]


def best(logits):
    """The likeliest token of each row."""
    return logits.argmax(dim=-1).tolist()


def recording(model, calls: list):
    """The model's forward, noting the logits it gave."""

    def forward(ids, documents, positions, cache):
        logits = model(ids, documents, positions, cache=cache)
        assert logits.shape[1] == 1
        calls.append(logits[:, 0])
        return logits

    return forward


def test_with_a_cache_tokens_and_logits_are_those_without(model):
    calls: list = []
    forward = recording(model, calls)

    continued = continue_together(PROMPTS, [12] * 4, END, CPU, forward, best, bool)

    for row, (prompt, (ids, ended)) in enumerate(paired(PROMPTS, continued)):
        assert len(ids) == 12 or ended
        for step in range(len(ids) + ended):
            alone = without_cache(model, prompt + ids[:step])
            torch.testing.assert_close(calls[step][row], alone, atol=1e-5, rtol=0)
            assert int(alone.argmax()) == (ids[step] if step < len(ids) else END)


def test_a_row_ends_at_the_end_token_or_its_limit_and_the_others_go_on():
    tokens = iter([[5, END, 7], [6, 3, 8], [END, 4, 9]])

    def forward(ids, documents, positions, cache):
        cache.open(documents)
        return torch.zeros(3, 1, 10)

    continued = continue_together([[1], [1, 1], [1]], [9, 9, 2], END, CPU, forward, lambda _: next(tokens), bool)

    assert [tuple(row) for row in continued] == [([5, 6], True), ([], True), ([7, 8], False)]
    assert next(tokens, None) is None


def test_shorter_prompts_are_padded_on_the_left_and_positions_count_from_their_first_token():
    seen = []

    def forward(ids, documents, positions, cache):
        cache.open(documents)
        seen.append((ids.tolist(), documents.tolist(), positions.tolist()))
        return torch.zeros(2, 1, 10)

    batch = Continuation([[1, 4, 5], [1]], [2, 2], END, CPU)
    batch.step(forward, lambda _: [6, 7])
    batch.step(forward, lambda _: [8, 9])

    assert seen[0] == ([[1, 4, 5], [END, END, 1]], [[0, 0, 0], [-1, -1, 0]], [[0, 1, 2], [0, 0, 0]])
    assert seen[1] == ([[6], [7]], [[0], [0]], [[3], [1]])
    assert not batch.running and [row.ids for row in batch.results()] == [[6, 8], [7, 9]]


def test_ranks_that_are_done_or_have_nothing_call_a_collective_forward_as_often_as_the_others(model):
    others = iter([True, True, True, False])
    calls: list = []

    continued = continue_together(
        [[1, 5]], [2], END, CPU, recording(model, calls), best, lambda here: next(others) or here
    )
    assert len(calls) == 3 and len(continued[0].ids) <= 2

    others = iter([True, False])
    assert continue_together([], [], END, CPU, recording(model, calls), best, lambda here: next(others) or here) == []
    assert len(calls) == 4
