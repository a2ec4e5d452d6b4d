"""Costs against counts by hand, and plans that keep to them."""

import pytest
import torch
from helpers.architectures import tiny_model
from helpers.models import build, tokens

import llm_pruner as lp
from llm_pruner.evaluation.cost import macs, macs_budget, memory, memory_budget


def test_multiply_accumulates_by_hand():
    model, t = build("llama_grouped"), 16
    c = model.config
    kv = c.num_key_value_heads * c.head_dim
    query = c.num_attention_heads * c.head_dim
    projections = 2 * c.hidden_size * (query + kv) + 3 * c.hidden_size * c.intermediate_size
    layer = t * projections + 2 * t * t * query
    assert macs(model, t) == c.num_hidden_layers * layer + t * c.hidden_size * c.vocab_size
    assert macs(model, t, batch=3) == 3 * macs(model, t)


def test_memory_by_hand():
    model = build("llama_grouped")
    c = model.config
    cache = 2 * c.num_hidden_layers * 3 * 16 * c.num_key_value_heads * c.head_dim * 4
    assert memory(model, tokens=16, batch=3) == 4 * sum(p.numel() for p in model.parameters()) + cache


def test_a_mixture_counts_the_experts_that_run():
    model = build("mixtral")
    c = model.config
    assert c.num_experts_per_tok < c.num_local_experts
    experts = 16 * c.num_experts_per_tok * 3 * c.hidden_size * c.intermediate_size * c.num_hidden_layers
    assert experts < macs(model, 16) < 2 * experts


@pytest.mark.parametrize("family", ("llama_grouped", "opt", "mamba"))
@pytest.mark.parametrize("budget", (macs_budget, memory_budget))
def test_plans_keep_to_the_budget(family, budget):
    wide = {"opt": {"hidden_size": 64, "ffn_dim": 512}, "llama_grouped": {"hidden_size": 64, "intermediate_size": 512}}
    model = build(family, **wide[family]) if family in wide else tiny_model(family)
    measure = {macs_budget: macs, memory_budget: memory}[budget]
    graph = lp.trace(model)
    kinds = ["channels"] if family == "mamba" else ["neurons", "heads"]
    scores = lp.score(model, graph, tokens(2, 16), kinds=kinds)
    whole = measure(model, 32)
    plan = lp.select(graph, scores, kinds=kinds, budget=budget(model, 0.9, 32))
    pruned = lp.apply(model, plan)
    assert 0.895 * whole <= measure(pruned, 32) <= 0.9 * whole
    assert torch.isfinite(pruned(tokens(1, 8)).logits).all()


def test_an_amount_or_a_share():
    model = build("llama_grouped", intermediate_size=512)
    graph = lp.trace(model)
    scores = lp.score(model, graph, criterion="l1")
    share = lp.select(graph, scores, kinds=["neurons"], budget=memory_budget(model, "0.8", 32))
    amount = f"{0.8 * memory(model, 32) / 1024:.3f}KiB"
    same = lp.select(graph, scores, kinds=["neurons"], budget=memory_budget(model, amount, 32))
    assert share.units.keys() == same.units.keys()
    assert 0.796 <= memory(lp.apply(model, share), 32) / memory(model, 32) <= 0.8
