"""The refit of the down projections of experts."""

import copy

import pytest
import torch
from helpers.architectures import perturbed, tiny_config
from helpers.models import build
from test_experts import mixture
from transformers import AutoModelForCausalLM

import llm_pruner as lp
from llm_pruner.models.running import logits
from llm_pruner.refit.added import added_experts, single_stack
from llm_pruner.refit.stream import ResidualStream
from llm_pruner.surgery.per_token import with_experts_per_token

IDS = torch.randint(3, 60, (64, 16), generator=torch.Generator().manual_seed(0))
OTHERS = torch.randint(3, 60, (16, 16), generator=torch.Generator().manual_seed(1))


def half(model):
    graph = lp.trace(model)
    scores = lp.score(model, graph, IDS, "frequency", kinds=["experts"])
    return lp.apply(model, lp.select(graph, scores, 0.5, kinds=["experts"]))


def error(model, expected):
    return (logits(model, OTHERS) - expected).square().mean().item()


# Softmax before the top-k; after it, with biases; sigmoid, in groups, with a shared expert.
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_the_refit_brings_outputs_closer(name):
    model = mixture(name)
    pruned, expected = half(model), logits(model, OTHERS)
    before, weights = error(pruned, expected), copy.deepcopy(pruned.state_dict())
    report = lp.compensate(model, pruned, IDS)
    experts = [refit for refit in report.layers if refit.module.endswith("experts")]
    assert experts and all(refit.ridge is not None and refit.after < 0.9 * refit.before for refit in experts)
    assert error(pruned, expected) < 0.8 * before
    assert torch.equal(logits(model, OTHERS), expected)
    moved = {key.rpartition(".")[2] for key, tensor in pruned.state_dict().items() if (tensor != weights[key]).any()}
    assert "down_proj" in moved and not moved & {"gate_up_proj", "down_proj_bias", "gate_up_proj_bias"}


def test_a_damaged_expert_is_mended():
    model = with_experts_per_token(mixture("mixtral"), 1)  # so that no other expert can make up for it
    damaged = copy.deepcopy(model)
    stack = damaged.model.layers[1].mlp.experts.down_proj
    with torch.no_grad():
        stack[2] *= 0.5
    original = model.model.layers[1].mlp.experts.down_proj
    off = (stack - original).norm()
    report = lp.compensate(model, damaged, IDS)
    assert [refit.module for refit in report.layers if refit.ridge is not None and refit.before > 1e-9][-1] == (
        "model.layers.1.mlp.experts"
    )
    assert (stack - original).norm() < 0.05 * off


# The inputs of its experts are scaled; experts without weights follow the others.
@pytest.mark.parametrize(
    ("name", "path", "left"), [("llama4_text", "feed_forward.experts", 0.05), ("longcat_flash", "mlp.experts", 0.5)]
)
def test_experts_called_otherwise_are_mended(name, path, left):
    model = mixture(name)
    damaged = copy.deepcopy(model)
    with torch.no_grad():
        damaged.model.layers[-1].get_submodule(path).down_proj[2] *= 0.5
    expected = logits(model, OTHERS)
    before = error(damaged, expected)
    lp.compensate(model, damaged, IDS)
    assert error(damaged, expected) < left * before


@pytest.mark.parametrize("name", ["gpt_oss", "llama4_text"])
def test_tokens_on_disk_give_the_same_experts(name, monkeypatch):
    """Hidden states that do not fit in memory, and parts of an expert's tokens at a time."""
    model = mixture(name)
    in_memory, on_disk = half(model), half(model)
    lp.compensate(model, in_memory, IDS)
    monkeypatch.setattr("llm_pruner.refit.stream.IN_MEMORY", 0)
    monkeypatch.setattr("llm_pruner.refit.experts.AT_ONCE", 50)
    lp.compensate(model, on_disk, IDS)
    assert (logits(on_disk, OTHERS) - logits(in_memory, OTHERS)).abs().max() < 1e-3


def test_experts_in_half_precision():
    model = mixture("mixtral").bfloat16()
    pruned, expected = half(model), logits(model, OTHERS)
    before = error(pruned, expected)
    lp.compensate(model, pruned, IDS)
    assert error(pruned, expected) < 0.8 * before and pruned.dtype == torch.bfloat16


def test_biases_leave_experts_alone():
    model = mixture("gpt_oss")
    pruned = half(model)
    before = copy.deepcopy(pruned.model.layers[0].mlp.experts.state_dict())
    report = lp.compensate(model, pruned, IDS, "bias")
    assert not any(refit.module.endswith("experts") for refit in report.layers)
    assert all(torch.equal(t, before[key]) for key, t in pruned.model.layers[0].mlp.experts.state_dict().items())


@pytest.mark.parametrize(
    ("name", "found"), [("mixtral", {"mlp.experts": 1}), ("llama", {}), ("llama4_text", {"feed_forward.experts": 1})]
)
def test_experts_whose_output_is_added(name, found):
    model = mixture(name) if name != "llama" else build("llama")
    layers = single_stack(model)[1]
    with torch.no_grad():
        assert added_experts(ResidualStream(model, layers, [IDS[:8]]), 0) == found


def test_experts_whose_output_is_multiplied_before_it_is_added():
    config = tiny_config("granitemoe")
    config.residual_multiplier = 0.22
    model = perturbed(AutoModelForCausalLM, config)
    pruned = half(model)
    with torch.no_grad():
        stream = ResidualStream(pruned, single_stack(pruned)[1], [IDS[:8]])
        assert added_experts(stream, 0) == pytest.approx({"block_sparse_moe.experts": 0.22}, rel=1e-3)
    report = lp.compensate(model, pruned, IDS)
    refits = [refit for refit in report.layers if refit.module.endswith("experts")]
    assert refits and all(refit.after < refit.before for refit in refits)
    again = lp.compensate(model, lp.apply(pruned, lp.PruningPlan()), IDS)
    (first,) = [refit for refit in again.layers if refit.module == refits[0].module]
    assert first.before < 1.01 * refits[0].after  # the experts were moved as the refit says
