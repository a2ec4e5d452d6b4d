"""Configs that count layers by a list, have two vocabularies, refuse numbers of heads, or tie what the files hold."""

import pytest
import torch
from helpers.models import pruned_by
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import llm_pruner as lp
from llm_pruner.checkpoint.apply_files import apply_to_files
from llm_pruner.surgery.uniform import to_uniform

SIZES = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 64}


def without_layers(model, gone):
    graph, plan = lp.trace(model), lp.PruningPlan()
    (unit,) = graph.of_kind("layers")
    plan.keep(unit, torch.tensor([i for i in range(unit.size) if i not in gone]), graph.shapes)
    return plan, lp.apply(model, plan)


def test_layers_are_counted_by_a_list():
    kinds = ["mamba", "attention", "moe", "mamba", "attention", "moe"]
    config = NemotronHConfig(
        **SIZES,
        head_dim=16,
        layers_block_type=kinds,
        mamba_num_heads=4,
        mamba_head_dim=16,
        ssm_state_size=8,
        n_groups=2,
        chunk_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        moe_shared_expert_intermediate_size=32,
    )
    model = NemotronHForCausalLM(config).eval()
    before = list(model.config.layers_block_type)
    _, pruned = without_layers(model, (3, 5))
    assert pruned.config.layers_block_type == [kind for i, kind in enumerate(before) if i not in (3, 5)]
    assert len(pruned.model.layers) == 4


def test_leading_layers_are_counted_anew():
    sliding = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 4}
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES, num_hidden_layers=8, **sliding)).eval()
    plan, pruned = without_layers(model, (1, 2))
    assert pruned.config.max_window_layers == 2 == pruned.config.layer_types.count("full_attention")
    assert lp.verify(model, pruned, plan).equivalent


def test_embeddings_of_every_layer_lose_the_same_tokens():
    config = Gemma4TextConfig(
        **SIZES,
        num_hidden_layers=4,
        head_dim=16,
        global_head_dim=16,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2,
        hidden_size_per_layer_input=16,
        vocab_size_per_layer_input=128,
    )
    model = Gemma4ForCausalLM(config).eval()
    graph, plan = lp.trace(model), lp.PruningPlan()
    plan.keep(graph.of_kind("vocabulary")[0], torch.arange(100), graph.shapes)
    pruned = lp.apply(model, plan)
    assert pruned.config.vocab_size == pruned.config.vocab_size_per_layer_input == 100
    assert lp.verify(model, pruned, plan).equivalent


def test_a_number_of_heads_that_the_config_refuses_is_padded_to_one_that_it_takes(tmp_path):
    """Nine of twelve heads do not divide a hidden size of 96."""
    config = LlamaConfig(**SIZES | {"hidden_size": 96, "num_attention_heads": 12, "num_key_value_heads": 4}, head_dim=8)
    model = LlamaForCausalLM(config).eval()
    graph = lp.trace(model)
    pruned = lp.apply(model, lp.select(graph, lp.score(model, graph, criterion="l2"), 0.25, ("heads",)))
    assert pruned.model.layers[0].self_attn.q_proj.out_features == 9 * 8
    uniform = to_uniform(pruned)
    assert (uniform.config.num_attention_heads, uniform.config.num_key_value_heads) == (12, 4)
    uniform.save_pretrained(tmp_path / "uniform")
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "uniform")(ids).logits
        torch.testing.assert_close(found, pruned(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("from_files", (False, True))
def test_a_head_of_its_own_is_kept_although_the_config_ties_it(from_files, tmp_path, caplog):
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=2, tie_word_embeddings=True)).eval()
    model.save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    head = torch.randn(128, 64)
    save_file(load_file(file) | {"lm_head.weight": head}, file, metadata={"format": "pt"})
    loaded, _ = lp.load(str(tmp_path / "model"))
    plan, pruned = pruned_by(loaded, kinds=["neurons"])
    assert lp.verify(loaded, pruned, plan).equivalent
    if from_files:
        apply_to_files(plan, str(tmp_path / "model"), tmp_path / "pruned")
    else:
        lp.save(pruned, None, tmp_path / "pruned", plan)
    assert "its config ties head and embeddings, and its files hold both" in caplog.text
    stock, info = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", output_loading_info=True)
    assert torch.equal(stock.lm_head.weight, head) and not info["missing_keys"] and not info["unexpected_keys"]
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        torch.testing.assert_close(stock(ids).logits, pruned(ids).logits)
