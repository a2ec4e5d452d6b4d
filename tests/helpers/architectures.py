"""Tiny random models of everything that transformers registers, found programmatically.

A config is made small by the names of its fields, which are conventional, in sub-configs too; of layers that
differ, one of each sort stays. Models whose defaults make no sense when small need a few more values, in
``MORE``. What cannot be built so is reported by the caller, not skipped in silence.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.utils import DummyObject

from llm_pruner.models.tasks import CTC, FEATURES, FILL_MASK, IMAGE_TEXT, SPEECH, TASKS, TEXT_GENERATION, TEXT_TO_TEXT

LAYERS, MOST_LAYERS = 2, 4
LARGEST = 8_000_000  # parameters of a model that counts as tiny
SLOW = {"hiera"}  # small, but minutes to run


def _all(names: str, value: int) -> dict[str, int]:
    return dict.fromkeys(names.split(), value)


SMALL: dict[str, int] = {
    **_all("vocab_size vocab_size_per_layer_input src_vocab_size tgt_vocab_size decoder_vocab_size", 96),
    **_all("pronunciation_vocab_size shape_vocab_size type_vocab_size", 96),
    **_all("codebook_size", 64),
    **_all("hidden_size n_embd d_model dim embed_dim emb_dim word_embed_proj_dim embedding_size input_dim", 32),
    **_all("attention_hidden_size lru_width hidden_size_global output_dim cross_attention_hidden_size", 32),
    **_all("hidden_size_per_layer_input altup_lora_rank laurel_rank o_lora_rank hc_lowrank backbone_hidden_size", 8),
    **_all("intermediate_size ffn_dim n_inner ffn_hidden_size decoder_ffn_dim encoder_ffn_dim d_ff dim_ff", 48),
    **_all("feed_forward_size", 48),
    **_all("moe_intermediate_size expert_ffn_hidden_size", 24),
    **_all("shared_expert_intermediate_size moe_shared_expert_intermediate_size shared_intermediate_size", 40),
    **_all("shared_experts_intermediate_size", 40),
    **_all("num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_encoder_layers", LAYERS),
    **_all("num_decoder_layers depth num_block encoder_hidden_layers speech_encoder_layers", LAYERS),
    **_all("num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads", 4),
    **_all("num_encoder_attention_heads num_decoder_attention_heads attention_heads", 4),
    **_all("num_key_value_heads num_kv_heads", 2),
    **_all("head_dim dim_head d_kv kv_channels attention_head_size qk_nope_head_dim v_head_dim index_head_dim", 8),
    **_all("attention_head_dim", 16),
    **_all("qk_rope_head_dim rotary_dim", 4),
    **_all("q_lora_rank", 12),
    **_all("kv_lora_rank", 10),
    **_all("index_n_heads o_groups hc_mult hc_count", 2),
    **_all("index_topk", 8),
    **_all("n_positions n_ctx max_position_embeddings max_seq_len max_sequence_length model_max_length", 64),
    **_all("max_source_positions max_target_positions max_encoder_position_embeddings", 64),
    **_all("max_decoder_position_embeddings context_length", 64),
    **_all("num_local_experts num_experts n_routed_experts moe_num_experts", 4),
    **_all("num_experts_per_tok num_experts_per_token moe_top_k moe_topk moe_k", 2),
    **_all("n_group topk_group num_expert_group n_shared_experts num_shared_experts first_k_dense_replace", 1),
    **_all("decoder_sparse_step num_dense_layers mamba_n_groups n_groups", 1),
    **_all("state_size mamba_d_state ssm_state_size", 4),
    **_all("mamba_n_heads mamba_num_heads mamba_d_head mamba_head_dim chunk_size mamba_chunk_size", 8),
    **_all("mamba_d_ssm", 64),
    **_all("time_step_rank mamba_dt_rank", 3),
    **_all("linear_num_key_heads", 2),
    **_all("linear_num_value_heads linear_num_heads", 4),
    **_all("linear_key_head_dim linear_value_head_dim linear_head_dim", 8),
    **_all("sliding_window attention_window_size local_radius global_block_size block_size", 8),
    **_all("image_size", 28),
    **_all("patch_size", 14),
    **_all("mm_tokens_per_image", 4),
    **_all("out_hidden_size", 32),
    **_all("position_embedding_size", 16),
    **_all("vision_start_token_id vision_end_token_id", 89),
    **_all("image_token_id image_token_index", 90),
    **_all("video_token_id video_token_index", 91),
    **_all("audio_token_id audio_token_index", 92),
}  # fmt: skip

# Angles of time, height and width, of a head of 8 channels.
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
MROPE_OF_HALF = {"head_dim": 16, "rope_parameters": MROPE["rope_parameters"] | {"partial_rotary_factor": 0.5}}
# Values that a model needs beside the conventional ones, because its defaults contradict each other when small.
MORE: dict[str, dict[str, Any]] = {
    "aria": {"projector_patch_to_query_dict": {4: 4}},
    "bamba": {"attn_layer_indices": [1]},
    "blip-2": {"image_token_index": 90},
    "blt": {"encoder_hash_byte_group_vocab": 96, "encoder_hash_byte_group_size": [3]},
    "codegen": {"n_head": 8},  # its projections come in four parts, whatever the config says
    "cohere_compass_text": {
        "rope_parameters": {
            t: {"rope_type": "default", "rope_theta": 1e4} for t in ("full_attention", "sliding_attention")
        }
    },
    "cpmant": {"position_bias_num_buckets": 32},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_v4": {"head_dim": 16},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots3_note_text": {
        "per_layer_config": {2: {"num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 14}},
        "head_dim": 12,
    },
    "gemma3n_text": {
        "intermediate_size": [48] * 4,
        "activation_sparsity_pattern": [0.0] * 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
    },
    "gemma4_text": {"per_layer_config": {1: {"head_dim": 16}}, "layer_types": ["sliding_attention", "full_attention"]},
    "gemma4_unified_text": {
        "per_layer_config": {1: {"head_dim": 16}},
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gpt_neo": {
        "attention_types": [[["global", "local"], 1]],
        "attention_layers": ["global", "local"],
        "window_size": 8,
    },
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "num_experts": 4, "moe_topk": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "led": {"attention_window": 8},
    **{kind: {"image_grid_pinpoints": [[28, 56]]} for kind in ("llava_next", "llava_next_video", "llava_onevision")},
    "longcat_flash": {"zero_expert_num": 2, "head_dim": 4},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "paligemma": {"projection_dim": 32},
    "pixtral": {"image_size": 56},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "dinov3_vit": {"num_register_tokens": 4},
    "swin": {
        "image_size": 32,
        "patch_size": 4,
        "embed_dim": 16,
        "depths": [1, 1],
        "num_heads": [2, 2],
        "window_size": 4,
    },
    "reformer": {"is_decoder": True, "axial_pos_shape": [8, 8], "axial_pos_embds_dim": [16, 16]},
    "roc_bert": {"pronunciation_embed_dim": 8, "shape_embed_dim": 8},
    "vipllava": {"vision_feature_layers": [-1, -2]},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_hidden_layers": 4,
        "attention_hidden_size": 64,
        "hybrid_layer_ids": [1, 3],
        "n_mamba_heads": 8,
        "mamba_headdim": 8,
    },
    "zamba": {
        "attention_hidden_size": 64,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_hidden_layers": 4,
    },
    "zaya": {"num_experts_per_tok": 1},
    "t5": {"decoder_start_token_id": 0},  # as all its checkpoints have
    **dict.fromkeys(
        ("qwen2_vl_text", "qwen2_5_vl_text", "paddleocr_vl_text", "qwen2_5_omni_text", "glm_ocr_text"), MROPE
    ),
    **dict.fromkeys(("glm4v_text", "glm4v_moe_text"), MROPE_OF_HALF),
    "llama4_vision_model": {
        "intermediate_size": 128,
        "projector_input_dim": 32,
        "projector_output_dim": 32,
        "vision_output_dim": 32,
    },
}


def model_types() -> list[str]:
    """Every model type with a causal language model, then every one with an encoder-decoder."""
    return [
        *sorted(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        *(f"{t}:seq2seq" for t in sorted(modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES)),
    ]


OF_TEXT = (FILL_MASK, "text-classification", "token-classification", "question-answering", FEATURES)
OF_MEDIA = (
    *(
        "image-classification",
        "video-classification",
        "image-segmentation",
        "depth-estimation",
        "object-detection",
    ),
    *("audio-classification", SPEECH, CTC, FEATURES),
)


def other_types() -> list[str]:
    """Every model type that reads text for another task, and the task."""
    return [f"{model_type}:{task}" for task in OF_TEXT for model_type in sorted(_types_of(task, media=False))]


def media_types() -> list[str]:
    """Every model type that reads images or sounds, beside text or without, and the task; none that writes text about
    them."""
    return [f"{model_type}:{task}" for task in OF_MEDIA for model_type in sorted(_types_of(task, media=True))]


def image_text_types() -> list[str]:
    """Every model type that reads images and writes text, and the task."""
    return [
        f"{model_type}:{IMAGE_TEXT}" for model_type in sorted(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    ]


def _types_of(task: str, *, media: bool) -> list[str]:
    """The model types of a task; of bare models that read text only those that are encoders."""
    found = []
    for model_type, classes in getattr(modeling_auto, TASKS[task][1]).items():
        one = getattr(transformers, classes if isinstance(classes, str) else classes[0], None)
        if not isinstance(one, type) or isinstance(one, DummyObject):  # it needs a package that is not installed
            continue
        parameters = inspect.signature(one.forward).parameters
        of_media = one.main_input_name != "input_ids" or "return_loss" in parameters
        encoder = of_media or model_type in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
        if (encoder or task != FEATURES) and of_media == media:
            found.append(model_type)
    return found


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The default config of a model type, and of every model inside it, with every conventional field made small."""
    return AutoConfig.for_model(model_type, **small(AutoConfig.for_model(model_type).to_dict(), model_type))


def small(default: dict[str, Any], model_type: str) -> dict[str, Any]:
    fields: dict[str, Any] = {k: v for k, v in SMALL.items() if isinstance(default.get(k), int)}
    if "qk_rope_head_dim" in fields:
        fields.pop("head_dim", None)  # latent attention has head sizes of its own, and as many keys as queries
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    fields |= {k: int(k.startswith("eos")) for k in ("bos_token_id", "eos_token_id", "pad_token_id") if k in default}
    per_layer = {k: v for k, v in default.items() if isinstance(v, list) and len(v) == default.get("num_hidden_layers")}
    if per_layer:  # one layer of each sort
        sorts: dict[str, int] = {}
        for i, sort in enumerate(zip(*per_layer.values(), strict=True)):
            sorts.setdefault(repr(sort), i)
        last = len(next(iter(per_layer.values()))) - 1
        chosen = sorted(sorts.values() if len(sorts) >= LAYERS else {0, last})[:MOST_LAYERS]
        fields |= {k: [v[i] for i in chosen] for k, v in per_layer.items()}
        fields["num_hidden_layers"] = len(chosen)
    for name, value in default.items():
        if isinstance(value, dict) and "model_type" in value:
            kind = value["model_type"]
            fields[name] = {"model_type": kind} | small(value, kind)
    fields.pop("per_layer_config", None)
    more = MORE.get(model_type, {})
    for name, value in more.items():
        fields[name] = (
            fields.get(name, {}) | value if isinstance(value, dict) and isinstance(fields.get(name), dict) else value
        )
    return fields


def perturbed(auto_class: Any, config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A random model; every parameter is perturbed, so that none is zero or one by initialisation."""
    torch.manual_seed(seed)
    model = auto_class.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def tiny_model(name: str, seed: int = 0) -> PreTrainedModel:
    """A tiny random model of a type that is registered.

    Raises whatever transformers raises for a config that it cannot build, ValueError where it is not small.
    """
    model_type, _, task = name.partition(":")
    auto_class = getattr(transformers, TASKS[{"": TEXT_GENERATION, "seq2seq": TEXT_TO_TEXT}.get(task, task)][0])
    if model_type in SLOW:
        raise ValueError("not made quick by conventional field names")
    config = tiny_config(model_type)
    with torch.device("meta"):
        size = sum(p.numel() for p in auto_class.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"not made small by conventional field names: {size:,} parameters")
    return perturbed(auto_class, config, seed)
