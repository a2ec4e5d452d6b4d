"""Tiny random models of every decoder that transformers registers, found programmatically.

A config is made small by the names of its fields: widths, counts and lengths have conventional names. What
cannot be built so small is reported by the caller, not skipped in silence.
"""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

LAYERS = 2
SMALL = {
    "vocab_size": 96,
    "vocab_size_per_layer_input": 96,
    "hidden_size": 32,
    "n_embd": 32,
    "d_model": 32,
    "dim": 32,
    "embed_dim": 32,
    "emb_dim": 32,
    "word_embed_proj_dim": 32,
    "embedding_size": 32,
    "hidden_size_per_layer_input": 8,
    "attention_hidden_size": 32,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "n_inner": 48,
    "ffn_hidden_size": 48,
    "decoder_ffn_dim": 48,
    "encoder_ffn_dim": 48,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
    "moe_shared_expert_intermediate_size": 40,
    "shared_intermediate_size": 40,
    "num_hidden_layers": LAYERS,
    "n_layer": LAYERS,
    "n_layers": LAYERS,
    "num_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_layers": LAYERS,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "rotary_dim": 4,
    "n_positions": 64,
    "n_ctx": 64,
    "max_position_embeddings": 64,
    "max_seq_len": 64,
    "max_sequence_length": 64,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_top_k": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "decoder_sparse_step": 1,
    "state_size": 4,
    "mamba_d_state": 4,
    "ssm_state_size": 4,
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "mamba_d_head": 8,
    "mamba_head_dim": 8,
    "mamba_n_groups": 1,
    "n_groups": 1,
    "time_step_rank": 3,
    "mamba_dt_rank": 3,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "lru_width": 32,
    "chunk_size": 8,
    "mamba_chunk_size": 8,
    "sliding_window": 8,
    "attention_window_size": 8,
}


def model_types() -> list[str]:
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The default config of a model type with every conventional field made small."""
    default = AutoConfig.for_model(model_type)
    fields = {k: v for k, v in SMALL.items() if isinstance(getattr(default, k, None), int) and k in default.to_dict()}
    if "qk_rope_head_dim" in fields:
        fields.pop("head_dim", None)  # latent attention has head sizes of its own, and as many keys as queries
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    fields |= {k: int(k.startswith("eos")) for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    for name, value in default.to_dict().items():
        if isinstance(value, list) and len(value) == getattr(default, "num_hidden_layers", 0):
            fields[name] = value[: LAYERS - 1] + value[-1:]
    return AutoConfig.for_model(model_type, **fields)


def tiny_model(model_type: str, seed: int = 0) -> PreTrainedModel:
    config = tiny_config(model_type)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > 2_000_000:
        raise ValueError(f"not made small by conventional field names: {size:,} parameters")
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model
