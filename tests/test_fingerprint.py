"""A graph is found anew when a model's structure changes, and only then."""

import functools

import pytest
import torch
from helpers.models import build, pruned_by
from torch import nn
from transformers.activations import ACT2FN

from llm_pruner.graph import units
from llm_pruner.graph.fingerprint import fingerprint
from llm_pruner.graph.units import share_graph, trace


@pytest.fixture
def traced(monkeypatch):
    """The models that were really traced."""
    models, really_trace = [], units._trace
    monkeypatch.setattr(units, "_trace", lambda model: models.append(model) or really_trace(model))
    return models


class Flipped(nn.Module):
    """An MLP with the weights of Llama's, whose neurons have a fixed order."""

    def __init__(self, mlp):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, x):
        return self.down_proj((self.gate_proj(x) * self.up_proj(x)).cumsum(-1))


def test_a_block_of_the_same_shapes_and_other_wiring_is_seen():
    model = build("llama")
    assert len(trace(model).of_kind("neurons")) == 3
    model.model.layers[1].mlp = Flipped(model.model.layers[1].mlp)
    assert [unit.layer for unit in trace(model).of_kind("neurons")] == [0, 2]


class Scan(nn.Module):
    def forward(self, x):
        return x.cumsum(-1)


def test_another_activation_is_seen():
    model = build("llama")
    trace(model)
    model.model.layers[0].mlp.act_fn = Scan()
    assert [unit.layer for unit in trace(model).of_kind("neurons")] == [1, 2]
    model.model.layers[0].mlp.act_fn = ACT2FN["silu"]
    assert len(trace(model).of_kind("neurons")) == 3


def test_another_number_of_heads_is_seen():
    """GPT-2's attention keeps its head count in an attribute; no weight has other shapes for it."""
    model = build("gpt2")
    assert [unit.size for unit in trace(model).of_kind("heads")] == [4, 4, 4]
    attention = model.transformer.h[1].attn
    attention.num_heads, attention.head_dim = 2, 16
    assert [unit.size for unit in trace(model).of_kind("heads")] == [4, 2, 4]


def _scanned(mlp, x):
    return mlp.down_proj((mlp.gate_proj(x) * mlp.up_proj(x)).cumsum(-1))


CHANGES = {
    "a forward of its own": lambda mlp: setattr(mlp, "forward", functools.partial(_scanned, mlp)),
    "a hook before": lambda mlp: mlp.register_forward_pre_hook(lambda _, args: None),
    "a hook after": lambda mlp: mlp.register_forward_hook(lambda *_: None),
    "another function": lambda mlp: setattr(mlp, "act_fn", torch.tanh) if mlp._modules.pop("act_fn") else None,
    "a flag": lambda mlp: setattr(mlp, "transposed", True),
    "a module that it shares": lambda mlp: setattr(mlp, "up_proj", mlp.gate_proj),
    "a tied weight": lambda mlp: setattr(mlp.up_proj, "weight", mlp.gate_proj.weight),
    "a constant": lambda mlp: mlp.register_buffer("scale", torch.arange(3.0), persistent=False),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changes_are_seen_in_the_fingerprint(change):
    model = build("llama")
    before = fingerprint(model)
    assert fingerprint(model) == before
    change(model.model.layers[1].mlp)
    assert fingerprint(model) != before


def test_values_of_a_constant_count_only_where_they_are_the_same_along_an_axis():
    model = build("llama")
    model.register_buffer("scale", torch.ones(3), persistent=False)
    before = fingerprint(model)
    model.scale[1] = 2
    assert fingerprint(model) != before


def test_weights_modes_and_a_forward_pass_change_nothing(traced):
    model = build("llama_grouped")
    trace(model)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
        model.train()(torch.arange(8)[None])
    trace(model.to(torch.bfloat16))
    assert traced == [model]


@pytest.mark.parametrize("family", ("llama_grouped", "gpt2"))
def test_a_pruned_model_has_the_graph_of_the_twin_that_was_traced(family, traced):
    model = build(family)
    _, pruned = pruned_by(model)
    count = len(traced)
    trace(pruned)
    assert len(traced) == count
    pruned.get_decoder().register_forward_hook(lambda *_: None)
    trace(pruned)
    assert len(traced) == count + 1


def test_a_graph_is_not_shared_with_a_model_of_another_structure(traced):
    one, other = build("llama"), build("llama_grouped")
    trace(one)
    share_graph(other, one)
    assert len(trace(other).of_kind("query_heads")) == 3 and traced == [one, other]
