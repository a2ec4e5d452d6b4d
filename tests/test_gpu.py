"""CUDA: the same numbers as on the CPU, 16-bit weights, models moved to the device block by block."""

import pytest
import torch
from helpers.architectures import tiny_model
from helpers.models import build, pruned_by, rounded, tokens
from transformers import LlamaConfig, LlamaForCausalLM

import llm_pruner as lp
from llm_pruner.evaluation.latency import latency, latency_budget
from llm_pruner.evaluation.perplexity import perplexity
from llm_pruner.importance.taylor import VARIANTS
from llm_pruner.models.dispatch import spread
from llm_pruner.models.per_layer import layer_lists

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
FAMILIES = ("llama_grouped", "gpt2", "mixtral", "bloom", "gemma2", "t5:seq2seq")


def made(name):
    return build(name) if name in ("llama_grouped", "gpt2", "mixtral") else tiny_model(name)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_scores_are_those_of_the_cpu(name, variant):
    model, ids = made(name), tokens(3, 16)
    graph = lp.trace(model)
    expected = lp.score(model, graph, ids, taylor=variant).values
    streamed = lp.score(made(name), graph, ids, taylor=variant, device="cuda").values  # in bfloat16
    found = lp.score(model.cuda(), graph, ids, taylor=variant).values
    for unit, values in expected.items():
        torch.testing.assert_close(found[unit], values, rtol=1e-2, atol=1e-3 * values.max().item())
        assert torch.isfinite(streamed[unit]).all()


def test_narrow_weights_on_the_device():
    wide, narrow = rounded("llama_grouped")
    graph, ids = lp.trace(wide), tokens(8, 16)
    expected = lp.score(wide, graph, ids).values
    found = lp.score(narrow.cuda(), graph, ids).values
    streamed = lp.score(rounded("llama_grouped")[1], graph, ids, device="cuda").values
    for unit, values in expected.items():
        torch.testing.assert_close(found[unit], values, rtol=0.1, atol=0.05 * values.max().item())
        torch.testing.assert_close(streamed[unit], found[unit], rtol=1e-3, atol=1e-3 * values.max().item())


@pytest.mark.parametrize("name", FAMILIES)
def test_pruned_models_on_the_device(name):
    model = made(name).cuda()
    plan, pruned = pruned_by(model)
    assert {p.device.type for p in pruned.parameters()} == {"cuda"}
    assert lp.verify(model, pruned, plan).equivalent
    assert perplexity(pruned, tokens(2, 16)).tokens


def test_compensation_on_the_device():
    model = build("llama_grouped").cuda()
    _, pruned = pruned_by(model, kinds=("neurons",))
    ids, unseen = tokens(64, 16), tokens(16, 16, seed=9).cuda()

    def error():
        with torch.no_grad():
            return torch.nn.functional.mse_loss(pruned(unseen).logits, model(unseen).logits).item()

    before = error()
    lp.compensate(model, pruned, ids)
    assert error() < before


@pytest.mark.parametrize(("variant", "most"), [("param_first", 1.3), ("param_second", 1.3), ("param_mix", 1.5)])
def test_memory_is_that_of_the_weights(variant, most):
    config = LlamaConfig(hidden_size=2048, intermediate_size=5504, num_hidden_layers=24, num_attention_heads=16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    weights = sum(p.nbytes for p in model.parameters())
    graph = lp.trace(model)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    lp.score(model, graph, torch.randint(0, 32000, (10, 64)), taylor=variant, kinds=("heads", "neurons"))
    assert torch.cuda.max_memory_allocated() < most * weights


def halfway(model):
    """Embeddings, head and the first layers on the device, the others on the CPU."""
    layers = list(next(iter(layer_lists(model).values())))
    size = sum(t.nbytes for t in [*layers[0].parameters(), *layers[0].buffers()])
    rest = sum(p.nbytes for p in model.parameters()) - sum(p.nbytes for layer in layers for p in layer.parameters())
    spread(model, {torch.device("cuda", 0): rest + 1.5 * size})
    assert {p.device.type for p in model.parameters()} == {"cpu", "cuda"}
    return model


@pytest.mark.parametrize("name", ("llama_grouped", "gpt2", "bloom"))
def test_layers_on_several_devices(name):
    model, ids = made(name), tokens(32, 16)
    graph = lp.trace(model)
    expected, loss = lp.score(model, graph, ids).values, perplexity(model, ids).loss
    mixed = halfway(made(name))
    assert perplexity(mixed, ids).loss == pytest.approx(loss, rel=1e-3)
    for unit, values in lp.score(mixed, graph, ids).values.items():
        torch.testing.assert_close(values, expected[unit], rtol=1e-2, atol=1e-3 * values.max().item())
    plan, pruned = pruned_by(mixed, kinds=("neurons",))
    assert {p.device.type for p in pruned.parameters()} == {"cpu", "cuda"}
    assert lp.verify(mixed, pruned, plan).equivalent
    before = perplexity(pruned, ids).loss
    assert lp.compensate(mixed, pruned, ids).layers
    assert perplexity(pruned, ids).loss != before


def test_latency_on_the_device():
    model = build("llama_grouped").cuda()
    assert 0 < latency(model, 16) < 1e6
    assert latency_budget(model, lp.trace(model), 0.9, 16).measure(lp.PruningPlan()) > 0
