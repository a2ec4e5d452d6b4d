"""Compensation: what a linear map can put back is put back, and the rest is closer than before."""

import pytest
import torch
from conftest import build, pruned_by, tokens
from registry import tiny_model

import llm_pruner as lp
from llm_pruner.graph.verify import relative_difference
from llm_pruner.selection import PruningPlan


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def halved(model, kinds=("neurons",), seed=0):
    return pruned_by(model, seed=seed, kinds=kinds)[1]


@pytest.mark.parametrize("family", ("llama_grouped", "gpt2", "opt", "phi3", "gpt_neox"))
def test_unseen_tokens_come_closer_to_the_original(family):
    model = build(family)
    pruned = halved(model)
    ids, unseen = tokens(64, 16), tokens(16, 16, seed=9)
    before = torch.nn.functional.mse_loss(logits(pruned, unseen), logits(model, unseen))
    weights = {n: p.clone() for n, p in model.named_parameters()}
    report = lp.compensate(model, pruned, ids)
    after = torch.nn.functional.mse_loss(logits(pruned, unseen), logits(model, unseen))
    assert after < 0.9 * before
    assert [r.module.split(".")[-1] for r in report.layers] and all(r.after <= r.before for r in report.layers)
    assert any(r.ridge is not None for r in report.layers)
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters()), "the original has changed"


def test_twins_stand_in_for_each_other():
    """Of two neurons that always say the same, one can go if the other speaks for both."""
    model = build("llama")
    plan, graph = PruningPlan(), lp.trace(model)
    with torch.no_grad():
        for layer in model.model.layers:
            for projection in (layer.mlp.gate_proj, layer.mlp.up_proj):
                projection.weight[1::2] = projection.weight[::2]
    for unit in graph.of_kind("neurons"):
        plan.keep(unit, torch.arange(0, 48, 2), graph.shapes)
    pruned = lp.apply(model, plan)
    unseen = tokens(8, 16, seed=9)
    before = relative_difference(logits(pruned, unseen), logits(model, unseen))
    lp.compensate(model, pruned, tokens(128, 16))
    after = relative_difference(logits(pruned, unseen), logits(model, unseen))
    assert before > 0.05
    assert after < 0.01


def test_a_model_that_lost_nothing_is_left_alone():
    model = build("llama")
    twin = build("llama")
    report = lp.compensate(model, twin, tokens(32, 16))
    assert {r.ridge for r in report.layers} == {None}
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters()))


def test_heads_with_slopes_of_their_own():
    model = tiny_model("bloom")
    pruned = halved(model, kinds=("heads", "neurons"))
    unseen = tokens(16, 16, seed=9)
    before = torch.nn.functional.mse_loss(logits(pruned, unseen), logits(model, unseen))
    lp.compensate(model, pruned, tokens(64, 16))
    assert torch.nn.functional.mse_loss(logits(pruned, unseen), logits(model, unseen)) < before


def test_what_cannot_be_compensated_is_refused():
    model = build("llama")
    with pytest.raises(lp.PrunerError, match="at least 32 calibration samples"):
        lp.compensate(model, halved(model), tokens(8, 16))
    with pytest.raises(lp.PrunerError, match="narrower"):
        lp.compensate(model, halved(model, kinds=("hidden",)), tokens(32, 16))
    with pytest.raises(lp.PrunerError, match="one stack"):
        lp.compensate(tiny_model("t5:seq2seq"), tiny_model("t5:seq2seq"), tokens(32, 16))


def test_weights_of_16_bits():
    """They are computed with in float32 here, and stay what they are."""
    model = build("llama").to(torch.bfloat16)
    pruned = halved(model)
    ids, unseen = tokens(64, 16), tokens(16, 16, seed=9)
    before = torch.nn.functional.mse_loss(logits(pruned, unseen).float(), logits(model, unseen).float())
    lp.compensate(model, pruned, ids)
    after = torch.nn.functional.mse_loss(logits(pruned, unseen).float(), logits(model, unseen).float())
    assert after < 0.95 * before
    assert {p.dtype for p in pruned.parameters()} == {torch.bfloat16}


def test_logits_are_scaled_by_what_brings_them_closest():
    """A pruned model whose only fault is a head twice as loud gets it back."""
    model = build("llama")
    loud = build("llama")
    with torch.no_grad():
        loud.lm_head.weight.mul_(1.25)
    report = lp.compensate(model, loud, tokens(32, 16))
    assert report.temperature == pytest.approx(0.8, abs=0.021)
    assert torch.allclose(logits(loud, tokens(2, 8)), logits(model, tokens(2, 8)), rtol=0.05, atol=0.05)
