"""The decoder: names, what a token may see, and what must not change the result."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_runs import initialise
from torch.nn import functional

from cpm_cluster.training.errors import UserError
from cpm_cluster.training.model.attention import rotary_angles, rotate
from cpm_cluster.training.model.decoder import CPM, check_weights
from cpm_cluster.training.model.layers import RMSNorm
from cpm_cluster.training.model.lora import Delta, attach_lora, merged
from cpm_cluster.training.settings import LoraTuning

LORA = LoraTuning("lora", 4, 8.0, 0.0, ("project_q", "project_k", "project_v", "attention_out", "w_0", "w_1", "w_out"))


@pytest.fixture
def make_model(tiny_settings):
    """Build an initialised tiny model with dotted settings changed."""

    def make(recompute: bool = False, **changes) -> CPM:
        torch.manual_seed(0)
        model = CPM(tiny_settings(**changes).model, recompute)
        initialise(model)
        return model

    return make


def logits_of(model: CPM, ids: list[int]) -> torch.Tensor:
    """Run one document."""
    row = torch.tensor([ids])
    return model(row, torch.zeros_like(row), torch.arange(len(ids))[None])[0]


def test_the_state_dict_has_the_keys_and_shapes_of_cpm_9g(make_model):
    shapes = {name: tuple(weight.shape) for name, weight in make_model(**{"model.layers": 1}).state_dict().items()}

    layer = "encoder.layers.0."
    assert shapes == {
        "input_embedding.weight": (259, 32),
        "lm_head.weight": (259, 32),
        "encoder.output_layernorm.weight": (32,),
        layer + "self_att.layernorm_before_attention.weight": (32,),
        layer + "self_att.self_attention.project_q.weight": (32, 32),
        layer + "self_att.self_attention.project_k.weight": (16, 32),
        layer + "self_att.self_attention.project_v.weight": (16, 32),
        layer + "self_att.self_attention.attention_out.weight": (32, 32),
        layer + "ffn.layernorm_before_ffn.weight": (32,),
        layer + "ffn.ffn.w_in.w_0.weight": (48, 32),
        layer + "ffn.ffn.w_in.w_1.weight": (48, 32),
        layer + "ffn.ffn.w_out.weight": (32, 48),
    }


def test_tied_embeddings_leave_out_the_head_and_use_the_table(make_model):
    model = make_model(**{"model.tied_embeddings": True})

    assert "lm_head.weight" not in model.state_dict()
    assert logits_of(model, [1, 5, 9]).shape == (3, 259)


def test_an_untrained_model_is_as_good_as_guessing(make_model):
    ids = list(range(3, 43))

    loss = functional.cross_entropy(logits_of(make_model(), ids)[:-1], torch.tensor(ids[1:]))

    assert loss.item() == pytest.approx(math.log(259), abs=0.15)


def test_a_token_does_not_see_later_ones(make_model):
    model = make_model()

    assert torch.equal(logits_of(model, [1, 5, 9, 20])[:3], logits_of(model, [1, 5, 9, 30])[:3])


def test_documents_in_one_row_do_not_see_each_other(make_model):
    model = make_model()
    first, second = [1, 5, 9, 4], [1, 7, 8]
    packed = model(
        torch.tensor([first + second]),
        torch.tensor([[0] * 4 + [1] * 3]),
        torch.tensor([[0, 1, 2, 3, 0, 1, 2]]),
    )[0]

    torch.testing.assert_close(packed[:4], logits_of(model, first), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(packed[4:], logits_of(model, second), atol=1e-6, rtol=1e-5)


def test_grouped_queries_equal_repeated_key_heads(make_model):
    grouped, full = make_model(), make_model(**{"model.kv_heads": 4})
    weights = grouped.state_dict()
    for name, weight in weights.items():
        if "project_k" in name or "project_v" in name:
            weights[name] = weight.view(2, 8, 32).repeat_interleave(2, dim=0).reshape(32, 32)
    full.load_state_dict(weights)

    torch.testing.assert_close(logits_of(grouped, [1, 5, 9]), logits_of(full, [1, 5, 9]))


def test_rotary_scores_depend_on_distance_alone():
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 1, 1, 16)

    def score(query_at: int, key_at: int) -> float:
        angles = [rotary_angles(torch.tensor([[position]]), 16, 1e4) for position in (query_at, key_at)]
        return float((rotate(query, angles[0]) * rotate(key, angles[1])).sum())

    assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-4)
    assert score(9, 4) != pytest.approx(score(9, 3), abs=1e-3)
    assert score(0, 0) == pytest.approx(float((query * key).sum()), abs=1e-5)


def test_rms_norm_follows_its_formula():
    norm = RMSNorm(4, 1e-5)
    values = torch.tensor([[1.0, -2.0, 3.0, 4.0]])

    torch.testing.assert_close(norm(values), values / math.sqrt(30 / 4 + 1e-5))


def test_recomputing_activations_changes_no_gradient(make_model):
    gradients = []
    for recompute in (False, True):
        model = make_model(recompute)
        logits_of(model, [1, 5, 9, 20]).square().sum().backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters()})

    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_weights_that_do_not_fit_are_refused_by_name(make_model):
    model = make_model()
    own, weights = model.state_dict(), model.state_dict()
    del weights["lm_head.weight"]
    weights["extra.weight"] = torch.zeros(1)
    weights["encoder.output_layernorm.weight"] = torch.zeros(3)

    with pytest.raises(UserError) as caught:
        check_weights({name: weight.shape for name, weight in own.items()}, model.settings, weights, "base.pt")

    message = str(caught.value)
    assert "base.pt does not fit model cpm-test: 3 key(s) differ" in message
    assert "lm_head.weight is missing" in message and "extra.weight is unknown" in message
    assert "encoder.output_layernorm.weight is [3] instead of [32]" in message


def test_lora_starts_from_the_base_model_and_trains_nothing_else(make_model):
    base, adapted = make_model(), make_model()
    attach_lora(adapted, LORA)

    assert torch.equal(logits_of(base, [1, 5, 9]), logits_of(adapted, [1, 5, 9]))
    trained = {name for name, weight in adapted.named_parameters() if weight.requires_grad}
    assert len(trained) == 2 * 7 * 2 and all(".lora.lora_" in name for name in trained)
    assert set(base.state_dict()) == set(adapted.state_dict()) - trained


def test_merged_weights_compute_what_base_and_delta_compute(make_model):
    adapted = make_model()
    attach_lora(adapted, LORA)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight.normal_(std=0.1)
    everything = adapted.state_dict()
    delta = {name: weight for name, weight in everything.items() if ".lora." in name}
    base = {name: weight for name, weight in everything.items() if ".lora." not in name}

    whole = make_model()
    whole.load_state_dict(dict(merged(base, Delta(delta, alpha=8.0))))

    torch.testing.assert_close(logits_of(whole, [1, 5, 9]), logits_of(adapted, [1, 5, 9]), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(logits_of(make_model(), [1, 5, 9]), logits_of(whole, [1, 5, 9]), atol=1e-3)


def test_a_delta_of_another_model_is_not_merged(make_model):
    base = make_model().state_dict()
    delta = {"nowhere.lora.lora_A": torch.zeros(2, 32), "nowhere.lora.lora_B": torch.zeros(32, 2)}

    with pytest.raises(UserError, match="nowhere.weight does not fit"):
        merged(base, Delta(delta, alpha=1.0))
