"""Tiny models of images, sounds and texts with images."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from transformers import AutoConfig

import llm_pruner as lp

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = SIZES | {"image_size": 16, "patch_size": 8}
TEXT = SIZES | {"vocab_size": 99, "max_position_embeddings": 24}
SIDES = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 2), ("attention_heads", 4))}
SPEECH = {"vocab_size": 99, "d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 40, "pad_token_id": 0} | SIDES
CLASSES = {
    "ViTForImageClassification": ("vit", VISION | {"num_labels": 5}),
    "Dinov2Model": ("dinov2", VISION),
    "SiglipModel": ("siglip", {"text_config": TEXT, "vision_config": VISION}),
    "CLIPModel": ("clip", {"text_config": TEXT, "vision_config": VISION, "projection_dim": 24}),
    "ConvNextForImageClassification": ("convnext", {"hidden_sizes": [8, 16, 16, 16], "depths": [1] * 4}),
    "SwinModel": ("swin", {"image_size": 32, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}),
    "VideoMAEForVideoClassification": ("videomae", VISION | {"num_frames": 4}),
    "ASTForAudioClassification": (
        "audio-spectrogram-transformer",
        SIZES | {"max_length": 32, "num_mel_bins": 32, "patch_size": 8, "frequency_stride": 8, "time_stride": 8},
    ),
    "WhisperForConditionalGeneration": (
        "whisper",
        SPEECH
        | {"num_mel_bins": 16, "max_source_positions": 50, "max_target_positions": 40, "eos_token_id": 2}
        | {"bos_token_id": 1, "decoder_start_token_id": 1, "suppress_tokens": None, "begin_suppress_tokens": None},
    ),
    "Speech2TextForConditionalGeneration": (
        "speech_to_text",
        SPEECH | {"conv_channels": 16, "input_feat_per_channel": 16},
    ),
    "Wav2Vec2ForCTC": (
        "wav2vec2",
        SIZES
        | {"conv_dim": [16] * 3, "conv_kernel": [10, 3, 3], "conv_stride": [5, 2, 2], "num_conv_pos_embeddings": 16}
        | {"num_conv_pos_embedding_groups": 2},
    ),
}


def model_of(name):
    model_type, sizes = CLASSES[name]
    torch.manual_seed(0)
    model = getattr(transformers, name)(AutoConfig.for_model(model_type, **sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # some classes begin with blocks that add next to nothing
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


def save_llava(tokenizer, folder: Path, vision_layers: int = 2) -> Path:
    """Save a model of images and text with its processor."""
    tokenizer = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"], "pad_token": "<pad>"})
    marker = tokenizer.convert_tokens_to_ids("<image>")
    config = AutoConfig.for_model(
        "llava",
        text_config=AutoConfig.for_model("llama", **SIZES, vocab_size=len(tokenizer), num_key_value_heads=2),
        vision_config=AutoConfig.for_model("clip_vision_model", **VISION | {"num_hidden_layers": vision_layers}),
        image_token_index=marker,
    )
    torch.manual_seed(0)
    lp.save(transformers.LlavaForConditionalGeneration(config).eval(), None, folder)
    pixels = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    transformers.LlavaProcessor(
        pixels,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    return folder
