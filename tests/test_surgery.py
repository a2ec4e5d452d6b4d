"""Mask equivalence, live and reloaded, for every family, kind and shape of plan."""

import copy

import pytest
import torch
from helpers.models import ARCHITECTURES, build, pruned_by, tokens
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

import llm_pruner as lp
from llm_pruner.models.running import relative_difference


def same_when_reloaded(pruned, folder):
    lp.save(pruned, None, folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = tokens()
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, pruned(ids).logits)
    cached = loaded.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    plain = pruned.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(cached, plain)
    return loaded


@pytest.mark.parametrize("layers", [None, [1]], ids=["uniform", "per-layer"])
@pytest.mark.parametrize("kinds", [("heads", "neurons"), ("neurons",), ("heads",)], ids="+".join)
def test_mask_equivalence_live_and_reloaded(architecture, kinds, layers, tmp_path):
    model = build(architecture)
    ids = tokens()
    with torch.no_grad():
        before = model(ids).logits
    plan, pruned = pruned_by(model, kinds=kinds, layers=layers)
    report = lp.verify(model, pruned, plan)
    assert report.equivalent, report
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before), "the original has changed"
        assert relative_difference(pruned(ids).logits, before) > 1e-2, "pruning had no effect"
    assert type(pruned) is type(model)
    same_when_reloaded(pruned, tmp_path / "checkpoint")


def test_uniform_plans_need_nothing_of_ours(tmp_path):
    for name in ("llama_grouped", "qwen2", "mixtral", "phi3"):
        _, pruned = pruned_by(build(name))
        config = pruned.config.to_dict()
        assert "per_layer_config" not in config and "submodule_overrides" not in config
        lp.save(pruned, None, tmp_path / name)
        assert AutoConfig.from_pretrained(tmp_path / name).to_dict()["num_key_value_heads"] == 1


def test_experts_run_at_any_ratio():
    """Kernels of stacked experts want rows of 16 bytes, so their widths stay multiples of 8."""
    model = build("mixtral")
    for kinds in (("neurons",), ("hidden",)):
        _, pruned = pruned_by(model, 0.3, kinds=kinds)
        with torch.no_grad():
            assert pruned(tokens()).logits.isfinite().all()


def test_an_axis_that_scales_attention_is_flagged():
    graph = lp.trace(build("gpt2"))
    flags = {u.flags for u in graph.of_kind("channels") if "c_proj" not in "".join(u.parameters)}
    assert flags == {frozenset({"scale"})}


def test_query_heads_and_experts(tmp_path):
    model = build("mixtral")
    plan, pruned = pruned_by(model, kinds=["query_heads", "neurons"])
    assert lp.verify(model, pruned, plan).equivalent
    plan, pruned = pruned_by(model, kinds=["experts"])
    assert pruned.config.num_local_experts == 2
    same_when_reloaded(pruned, tmp_path / "experts")


def zero_hidden(model, graph, dead):
    """Make some hidden channels dead: nothing is ever written to them."""
    tensors = dict(model.named_parameters())
    (unit,) = graph.of_kind("hidden")
    with torch.no_grad():
        for name, dims in unit.slices(dead).items():
            for dim, positions in dims.items():
                tensors[name].index_fill_(dim, positions, 0)


def test_hidden_channels_that_are_dead_go_without_a_trace(architecture, tmp_path):
    """Removing planted dead channels is exact but for what norms average over, and that can be put back."""
    model = build(architecture)
    graph = lp.trace(model)
    dead = list(range(0, 32, 4))
    zero_hidden(model, graph, dead)
    (unit,) = graph.of_kind("hidden")
    scores = lp.Scores({unit.name: torch.tensor([float(i not in dead) for i in range(32)], dtype=torch.float64)})
    plan = lp.select(graph, scores, 0.25, kinds=["hidden"])
    assert plan.units[unit.name].kept.tolist() == [i for i in range(32) if i not in dead]
    pruned = lp.apply(model, plan)
    assert pruned.get_input_embeddings().weight.shape[1] == 24
    same_when_reloaded(pruned, tmp_path / "checkpoint")
    if architecture in ("llama", "llama_grouped", "mistral", "qwen2", "qwen3", "mixtral", "phi3"):
        # An RMS over 24 channels instead of 32 is larger by sqrt(32/24) when 8 of them are zero.
        with torch.no_grad():
            for name, parameter in pruned.named_parameters():
                if "norm" in name and parameter.shape == (24,):
                    parameter.mul_((32 / 24) ** 0.5)
        for module in pruned.modules():
            if hasattr(module, "variance_epsilon") and module.weight.shape == (24,):
                module.variance_epsilon *= 32 / 24
        with torch.no_grad():
            ids = tokens()
            assert relative_difference(pruned(ids).logits, model(ids).logits) < 1e-5


def test_first_layers(architecture, tmp_path):
    model = build(architecture)
    graph = lp.trace(model)
    plan = lp.select(graph, lp.score(model, graph, criterion="last"), counts={"layers": 2})
    pruned = lp.apply(model, plan)
    assert lp.verify(model, pruned, plan).equivalent
    assert pruned.config.num_hidden_layers == 2
    same_when_reloaded(pruned, tmp_path / "checkpoint")


def test_a_pruned_model_can_be_pruned_again(tmp_path):
    for name in ("llama", "gpt2", "opt"):
        model = build(name)
        _, once = pruned_by(model, 0.25, layers=[0, 1])
        plan, twice = pruned_by(once, 0.34, seed=5)
        assert lp.verify(once, twice, plan).equivalent
        same_when_reloaded(twice, tmp_path / name)


def test_coincidences_of_sizes_are_seen_through():
    """heads == head_dim == layers, and a head_dim that shapes alone cannot tell from heads."""
    for changes in (
        {"num_attention_heads": 8, "hidden_size": 64, "num_key_value_heads": 8, "num_hidden_layers": 8},
        {"num_attention_heads": 4, "num_key_value_heads": 4, "hidden_size": 16, "intermediate_size": 16},
        {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32, "intermediate_size": 32},
    ):
        for layers in (None, [1]):
            model = build("llama", **changes)
            plan, pruned = pruned_by(model, layers=layers)
            assert lp.verify(model, pruned, plan).equivalent


def test_dtype_and_buffers_survive(tmp_path):
    build("llama_grouped").to(torch.bfloat16).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    plan, pruned = pruned_by(model)
    assert {p.dtype for p in pruned.parameters()} == {torch.bfloat16}
    assert lp.verify(model, pruned, plan).equivalent
    for (name, a), (_, b) in zip(model.named_buffers(), pruned.named_buffers()):
        assert torch.equal(a, b) and a.dtype == b.dtype, name


def test_tied_embeddings_stay_tied():
    model = build("gpt2")
    _, pruned = pruned_by(model, kinds=["hidden"])
    assert pruned.lm_head.weight is pruned.transformer.wte.weight
    assert pruned.lm_head.weight.shape == (96, 16)


def test_per_layer_models_train(tmp_path):
    _, pruned = pruned_by(build("opt"), layers=[1])
    pruned.train()
    pruned.gradient_checkpointing_enable()
    ids = tokens()
    pruned(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in pruned.parameters() if p.requires_grad)


def test_a_change_of_attention_reaches_every_layer():
    model = build("llama")
    _, pruned = pruned_by(model, layers=[1])
    for implementation in ("eager", "sdpa"):
        pruned.set_attn_implementation(implementation)
        used = {layer.self_attn.config._attn_implementation for layer in pruned.model.layers}
        assert used == {implementation}


def test_a_pruned_model_can_be_copied(tmp_path):
    _, pruned = pruned_by(build("gpt2"), layers=[1])
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(pruned)(tokens()).logits, pruned(tokens()).logits)


def test_a_plan_for_another_model_is_refused():
    plan, pruned = pruned_by(build("llama"))
    with pytest.raises(lp.PrunerError, match="made for another model"):
        lp.verify(pruned, build("llama"), plan)
    with pytest.raises(lp.PrunerError, match="made for another model"):
        lp.apply(build("gpt2"), plan)
    with pytest.raises(lp.PrunerError, match="made for another model"):
        lp.apply(build("llama", intermediate_size=56), plan)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[1, 2]], "tokens must be a LongTensor .* not list"),
        (torch.zeros(0, 4, dtype=torch.long), r"tokens must be .* not torch.int64 \[0, 4\]"),
        (torch.tensor([[1, 96]]), "tokens has token id 96, the model a vocabulary of 96"),
    ],
)
def test_tokens_that_a_model_cannot_read_are_refused(ids, message):
    plan, pruned = pruned_by(build("llama"))
    with pytest.raises(lp.PrunerError, match=message):
        lp.verify(build("llama"), pruned, plan, ids)


@pytest.mark.parametrize(
    ("architecture", "buffer", "factor"), [("llama", "inv_freq", 3), ("gemma3_text", "embed_scale", 5)]
)
def test_the_oracle_compares_tables_that_no_checkpoint_holds(architecture, buffer, factor):
    model = build(architecture)
    plan, pruned = pruned_by(model, kinds=["neurons"])
    assert lp.verify(model, pruned, plan).equivalent
    found = [tensor for name, tensor in pruned.named_buffers() if name.endswith(buffer)]
    found[0].mul_(factor)
    assert not lp.verify(model, pruned, plan).equivalent


@pytest.mark.parametrize("tied", [False, True])
def test_mask_equivalence_of_a_smaller_vocabulary(tied):
    model = build("llama_grouped", tie_word_embeddings=tied)
    graph = lp.trace(model)
    plan, _ = pruned_by(model, kinds=["neurons"])
    (unit,) = graph.of_kind("vocabulary")
    plan.keep(unit, torch.tensor([i for i in range(unit.size) if i % 5 != 4]), graph.shapes)
    pruned = lp.apply(model, plan)
    assert lp.verify(model, pruned, plan).equivalent
    pruned.get_input_embeddings().weight.data[[3, 5]] = pruned.get_input_embeddings().weight.data[[5, 3]]
    assert not lp.verify(model, pruned, plan, torch.arange(16)[None]).equivalent


def test_an_edited_plan_that_no_config_expresses_is_refused():
    model = build("llama")
    plan, _ = pruned_by(model, kinds=["neurons"])
    plan.kept["model.layers.0.mlp.up_proj.weight"][0] = torch.arange(20)
    with pytest.raises(lp.PrunerError, match="no config of LlamaConfig"):
        lp.apply(model, plan)


FAMILIES = ("llama", "gpt2", "gpt_neox", "opt", "phi3", "stablelm")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    family=st.sampled_from(FAMILIES),
    groups=st.sampled_from([1, 2, 4]),
    members=st.sampled_from([1, 2, 3]),
    head_dim=st.sampled_from([4, 8, 16]),
    intermediate=st.integers(9, 70),
    layers=st.integers(1, 3),
    tied=st.booleans(),
    ratio=st.floats(0.1, 0.9),
    chosen=st.sampled_from([("neurons",), ("heads", "neurons"), ("query_heads", "heads", "neurons")]),
    seed=st.integers(0, 99),
)
def test_random_models_and_plans(family, groups, members, head_dim, intermediate, layers, tied, ratio, chosen, seed):
    heads = groups * members
    names = {"tie_word_embeddings": tied}
    if family == "gpt2":
        names |= {"n_embd": heads * head_dim, "n_head": heads, "n_inner": intermediate, "n_layer": layers}
    else:
        names |= {"hidden_size": heads * head_dim, "num_attention_heads": heads, "num_hidden_layers": layers}
        names |= {"ffn_dim": intermediate, "word_embed_proj_dim": heads * head_dim} if family == "opt" else {}
        names |= {"intermediate_size": intermediate} if family != "opt" else {}
        names |= {"num_key_value_heads": groups} if "num_key_value_heads" in ARCHITECTURES[family][1] else {}
        names |= {"num_key_value_heads": groups} if family == "llama" else {}
    model = build(family, seed, **names)
    graph = lp.trace(model)
    scores = lp.score(model, graph, criterion="random", seed=seed)
    try:
        plan = lp.select(graph, scores, ratio, kinds=chosen)
    except lp.PrunerError as error:
        assert "removes nothing" in str(error)
        return
    assert lp.verify(model, lp.apply(model, plan), plan).equivalent
