"""Whole layers, blocks of layers, shapes that are named, proportions."""

import json

import pytest
import torch
from conftest import build, tokens
from test_architectures import made
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

import llm_pruner as lp
from llm_pruner.arguments import PruneArguments
from llm_pruner.graph.verify import relative_difference
from llm_pruner.pipeline import Stopwatch, make_plan
from llm_pruner.surgery import in_memory


def planned(model, ids=None, **flags):
    args = PruneArguments(**({"pruner_type": "random", "depth": None, "hardware_align": False} | flags))
    args.check()
    return make_plan(args, model, ids, Stopwatch(), in_memory)


FAMILIES = {
    "llama": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 8},
    "llama_grouped": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
    "qwen3": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 16,
    },
    "gpt2": {"n_embd": 64, "n_layer": 4, "n_head": 8},
    "bloom": {"hidden_size": 64, "n_layer": 4, "n_head": 8},
    "opt": {
        "hidden_size": 64,
        "word_embed_proj_dim": 64,
        "ffn_dim": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
    },
    "t5": {"d_model": 64, "d_kv": 8, "d_ff": 96, "num_layers": 4, "num_decoder_layers": 3, "num_heads": 8},
    "mixtral": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "num_local_experts": 4,
    },
    "phi3": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
}
H, I, A, K, L, D = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "num_hidden_layers",
    "num_decoder_layers",
)
# The flags given, and what the config must say of them by its own names.
TARGETS = [
    ("llama", {H: 48}),
    ("llama", {I: 40}),
    ("llama", {L: 2}),
    ("llama", {H: 32, A: 4}),
    ("llama", {H: 40, I: 64, A: 4, K: 4, L: 3}),
    ("llama_grouped", {A: 4}),
    ("llama_grouped", {A: 4, K: 2}),
    ("llama_grouped", {A: 2, K: 2}),
    ("llama_grouped", {H: 48, I: 72, A: 6, K: 3, L: 3}),
    ("llama_grouped", {H: 16, I: 8, A: 1, K: 1, L: 1}),
    ("qwen3", {H: 48}),
    ("qwen3", {A: 4, K: 4}),
    ("qwen3", {H: 32, I: 64, A: 6, K: 3, L: 2}),
    ("qwen3", {H: 63, L: 1}),
    ("gpt2", {H: 32, A: 4}),
    ("gpt2", {I: 100}),
    ("gpt2", {L: 3}),
    ("gpt2", {H: 48, A: 6, I: 160, L: 2}),
    ("bloom", {L: 2}),
    ("bloom", {H: 32, A: 4}),
    ("bloom", {H: 48, A: 6, L: 3}),
    ("opt", {I: 48}),
    ("opt", {H: 32, A: 4, "word_embed_proj_dim": 32}),
    ("opt", {H: 48, A: 6, I: 40, L: 2, "word_embed_proj_dim": 48}),
    ("t5", {H: 48}),
    ("t5", {I: 40}),
    ("t5", {A: 4}),
    ("t5", {H: 32, I: 64, A: 6, L: 2, D: 2}),
    ("t5", {L: 3, D: 1}),
    ("mixtral", {H: 48}),
    ("mixtral", {I: 40}),
    ("mixtral", {"num_local_experts": 3}),
    ("mixtral", {H: 32, I: 64, A: 4, K: 2, L: 2}),
    ("phi3", {A: 4, K: 2}),
    ("phi3", {H: 32, I: 40, A: 4, K: 4, L: 2}),
]
OWN = {
    ("gpt2", I): "n_inner",
    ("opt", I): "ffn_dim",
    ("t5", I): "d_ff",
}
FLAGS = (H, I, A, K, L, D)


@pytest.mark.parametrize(("family", "shape"), TARGETS, ids=[f"{f}-{i}" for i, (f, _) in enumerate(TARGETS)])
def test_a_shape_is_had_exactly(family, shape, tmp_path):
    """The config is a stock one with the sizes asked for; what it builds has the weights' shapes and loads anywhere."""
    model = made(family.removesuffix("_grouped"), seq2seq=family == "t5", **FAMILIES[family])
    flags = {name: value for name, value in shape.items() if name in FLAGS}
    if flags != shape:
        (tmp_path / "target.json").write_text(json.dumps(shape))
        flags = {"target_config": str(tmp_path / "target.json")}
    found = planned(model, depth="spaced_middle", **flags)
    config = found.pruned.config
    for name, value in shape.items():
        own = OWN.get((family, name), config.attribute_map.get(name, name))
        assert getattr(config, own) == value
    same = type(config).from_dict(json.loads(config.to_json_string(use_diff=False)))
    auto = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
    stock = auto.from_config(same)
    assert {n: t.shape for n, t in stock.state_dict().items()} == {
        n: t.shape for n, t in found.pruned.state_dict().items()
    }
    kinds = {choice.kind for choice in found.plan.units.values()}
    if family != "bloom" or A not in shape:  # ALiBi's slopes are those of the new number of heads
        normed = any(found.graph.unit(name).flags for name in found.plan.units if "hidden" not in name)
        if not normed and (family != "t5" or H not in shape):  # T5 scales logits by the hidden size
            assert lp.verify(model, found.pruned, found.plan).equivalent, kinds
    lp.save(found.pruned, None, tmp_path / "out", plan=found.plan)
    ids = tokens(2, 8)
    loaded = auto.from_pretrained(tmp_path / "out").eval()
    more = {"decoder_input_ids": ids} if family == "t5" else {}
    with torch.no_grad():
        assert relative_difference(loaded(ids, **more).logits, found.pruned(ids, **more).logits) < 1e-6
    again = lp.PruningPlan.load(tmp_path / "out" / "pruning_plan.json")
    rebuilt = lp.apply(model, again, config=config)
    assert all(torch.equal(a, b) for a, b in zip(rebuilt.parameters(), found.pruned.parameters(), strict=True))
