"""Random models of the main families, and shapes that are easily taken for each other."""

import pytest
from helpers.models import made
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

import llm_pruner as lp
from llm_pruner.checkpoint.config import meta_model

WIDTHS = st.sampled_from([1, 2, 4])


@st.composite
def models(draw):
    """A model of one of the main families, of any shape."""
    family = draw(st.sampled_from(sorted(SHAPES)))
    groups, members, head_dim = draw(WIDTHS), draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([4, 8]))
    shape = {
        "heads": groups * members,
        "groups": groups,
        "head_dim": head_dim,
        "hidden": groups * members * head_dim,
        "inner": draw(st.integers(9, 60)),
        "layers": draw(st.integers(1, 3)),
        "bias": draw(st.booleans()),
        "tied": draw(st.booleans()),
    }
    return family, SHAPES[family](**shape), draw(st.integers(0, 99))


def decoder(*, heads, groups, head_dim, hidden, inner, layers, bias, tied, **names):
    return {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "num_hidden_layers": layers,
        "intermediate_size": inner,
        "head_dim": head_dim,
        "attention_bias": bias,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 64,
    }


SHAPES = {
    "llama": decoder,
    "gemma2": decoder,
    "qwen3": decoder,
    "mixtral": lambda **s: decoder(**s) | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": lambda **s: decoder(**s) | {"num_experts": 4, "num_experts_per_tok": 2},
    "cohere": decoder,
    "bloom": lambda **s: {"hidden_size": s["hidden"], "n_head": s["heads"], "n_layer": s["layers"]},
    "mpt": lambda **s: {"d_model": s["hidden"], "n_heads": s["heads"], "n_layers": s["layers"], "max_seq_len": 64},
    "falcon": lambda **s: {
        "hidden_size": s["hidden"],
        "num_attention_heads": s["heads"],
        "num_kv_heads": s["groups"],
        "num_hidden_layers": s["layers"],
        "new_decoder_architecture": True,
        "alibi": s["bias"],
        "ffn_hidden_size": s["inner"],
    },
    "gptj": lambda **s: {
        "n_embd": s["hidden"],
        "n_head": s["heads"],
        "n_layer": s["layers"],
        "rotary_dim": 4,
        "n_inner": s["inner"],
    },
    "t5": lambda **s: {
        "d_model": 24,
        "num_heads": s["heads"],
        "d_kv": s["head_dim"],
        "d_ff": s["inner"],
        "num_layers": s["layers"],
        "num_decoder_layers": s["layers"],
        "tie_word_embeddings": s["tied"],
    },
    "bart": lambda **s: {
        "d_model": s["hidden"],
        "encoder_attention_heads": s["heads"],
        "decoder_attention_heads": s["heads"],
        "encoder_ffn_dim": s["inner"],
        "decoder_ffn_dim": s["inner"] + 3,
        "encoder_layers": s["layers"],
        "decoder_layers": s["layers"],
        "max_position_embeddings": 64,
    },
    "deepseek_v3": lambda **s: {
        "hidden_size": 32,
        "num_attention_heads": s["heads"],
        "num_key_value_heads": s["heads"],
        "num_hidden_layers": s["layers"],
        "intermediate_size": s["inner"],
        "moe_intermediate_size": 24,
        "q_lora_rank": 12,
        "kv_lora_rank": 10,
        "qk_nope_head_dim": s["head_dim"],
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "max_position_embeddings": 64,
    },
}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    made_of=models(),
    ratio=st.floats(0.1, 0.9),
    chosen=st.sampled_from([("neurons",), ("heads", "neurons"), ("query_heads", "heads", "neurons")]),
    scope=st.sampled_from(["local", "global"]),
    seed=st.integers(0, 99),
)
@pytest.mark.slow
def test_random_models_of_the_main_families(made_of, ratio, chosen, scope, seed):
    family, fields, model_seed = made_of
    model = made(family, model_seed, seq2seq=family in ("t5", "bart"), **fields)
    graph = lp.trace(model)
    try:
        scores = lp.score(model, graph, criterion="random", seed=seed)
        plan = lp.select(graph, scores, ratio, kinds=chosen, scope=scope)
    except lp.PrunerError as error:
        assert "removes nothing" in str(error) or "nothing to prune" in str(error)
        return
    pruned = lp.apply(model, plan)
    if not any(graph.unit(name).flags for name in plan.units):  # OLMoE's norms run over all heads together
        assert lp.verify(model, pruned, plan).equivalent


def test_heads_are_not_taken_for_their_channels():
    """Three heads of four channels and four heads of three have the same shapes."""
    model = made("t5", 0, seq2seq=True, d_model=24, num_heads=4, d_kv=4, d_ff=9, num_layers=1, num_decoder_layers=1)
    graph = lp.trace(model)
    plan = lp.select(graph, lp.score(model, graph, criterion="random", seed=0), 0.375)
    assert lp.verify(model, lp.apply(model, plan), plan).equivalent


def test_a_671b_mixture_of_experts_on_meta():
    """DeepSeek-V3 as it is, but for its layer count: heads, neurons (routed and shared) and experts at once."""
    model = meta_model(AutoConfig.for_model("deepseek_v3", num_hidden_layers=5))
    graph = lp.trace(model)
    plan = lp.select(graph, lp.score(model, graph, criterion="random"), 0.25, kinds=["heads", "neurons", "experts"])
    config = lp.apply(model, plan).config.to_dict()
    assert config["num_attention_heads"] == config["num_key_value_heads"] == 96
    assert (config["intermediate_size"], config["moe_intermediate_size"]) == (13824, 1536)
    assert (config["n_routed_experts"], config["num_experts_per_tok"]) == (192, 8)
    assert "submodule_overrides" not in config


def test_as_many_heads_as_channels_each():
    """Four heads of four channels: one head of four has the shapes of four heads of one."""
    model = made("t5", 0, seq2seq=True, d_model=24, num_heads=4, d_kv=4, d_ff=11, num_layers=2, num_decoder_layers=2)
    graph = lp.trace(model)
    scores = lp.score(model, graph, criterion="random", seed=2)
    plan = lp.select(graph, scores, 0.5, kinds=["heads"], scope="global")
    kept = {name: choice.kept.numel() for name, choice in plan.units.items()}
    assert 1 in kept.values() and len(set(kept.values())) > 1
    pruned = lp.apply(model, plan)
    assert lp.verify(model, pruned, plan).equivalent
    for path, module in pruned.named_modules():
        if path.endswith("Attention"):
            assert module.key_value_proj_dim == 4 and module.n_heads * 4 == module.q.weight.shape[0]
            assert module.relative_attention_max_distance == 128
