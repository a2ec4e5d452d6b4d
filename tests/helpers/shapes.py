"""Models of several families, and plans of named shapes for them."""

from llm_pruner.pruning.arguments import PruneArguments
from llm_pruner.pruning.context import Planning
from llm_pruner.pruning.planning import make_plan
from llm_pruner.pruning.settings import resolve_settings

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


def planned(model, ids=None, **flags):
    """Plan the pruning of a model by the flags of ``prune``, with random scores unless they say otherwise."""
    arguments = PruneArguments.of(**({"preset": "paper", "pruner_type": "random"} | flags))
    return make_plan(Planning(settings=resolve_settings(arguments), ids=ids), model)
