"""Write language models as GGUF files, which llama.cpp reads.

Layers of one width keep the architecture's own name, and mixtures of experts need such layers. Layers that differ are
written as ``deci``, llama.cpp's name for Llama-like models with widths, heads and blocks by layer (Nemotron-NAS).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import PrunerError
from ..logs import log
from ..models.per_layer import Absent, has_per_layer_widths, stack_of
from .gguf_tokenizer import add_tokenizer, check_tokenizer

# llama.cpp's architecture by model type, and the types that `deci` can express: RMS norms, gated MLPs, rotary positions
# of whole heads, no norms of queries and keys.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
ARCHITECTURES |= {"mixtral": "llama", "olmoe": "olmoe", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe"}
ACTIVATION = {"hidden_act": "silu"}  # of all of these
FIXED: dict[str, dict[str, bool | None]] = {  # fields of configs that llama.cpp has for one value alone
    "olmoe": {"norm_topk_prob": False, "clip_qkv": None, "attention_bias": False},
    "qwen2_moe": {"norm_topk_prob": False},
    "qwen3": {"attention_bias": False},
    "qwen3_moe": {"norm_topk_prob": True, "attention_bias": False},
}
LIKE_LLAMA = ("llama", "mistral", "qwen2")
INTERLEAVED = ("llama", "deci")  # architectures whose rotary pairs are neighbours, not halves of a head
TYPES = {"f32": "F32", "f16": "F16", "q8_0": "Q8_0"}  # that gguf's own Python writes
EMPTY_WIDTH = 32  # neurons, all zero, of a layer whose MLP is removed: `deci` skips the attention of layers without MLP


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """Sizes of one layer; 0 for a removed block, and of neurons those of each expert, if there are any."""

    heads: int
    key_value_heads: int
    neurons: int
    experts: int = 0


def check_writable(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Refuse a model that has no GGUF architecture, before any file is opened.

    Raises:
        PrunerError: the model type, its rotary scaling or its tokenizer has no counterpart in llama.cpp.
    """
    config = model.config
    if config.model_type not in ARCHITECTURES:
        raise PrunerError(
            f"--format gguf writes {', '.join(ARCHITECTURES)}, and this is {config.model_type}: export it with "
            "--format hf and convert that folder with llama.cpp's own converter"
        )
    if has_per_layer_widths(config) and config.model_type not in LIKE_LLAMA:
        raise PrunerError(
            f"--format gguf: llama.cpp has no {config.model_type} with layers of different widths: prune with --uniform"
        )
    experts = {layer.experts for layer in layer_shapes(model)}
    if len(experts) > 1:
        raise PrunerError(
            f"--format gguf: llama.cpp has no {config.model_type} whose layers have {min(experts)} and {max(experts)} "
            "experts: export it with --format hf"
        )
    for name, needed in (ACTIVATION | FIXED.get(config.model_type, {})).items():
        if (value := getattr(config, name)) != needed:
            raise PrunerError(
                f"--format gguf: llama.cpp has no {config.model_type} with {name}={value}, only with {needed}: export "
                "it with --format hf"
            )
    if (kind := _rope(config)["rope_type"]) not in ("default", "linear", "llama3"):
        raise PrunerError(f"--format gguf cannot write rotary scaling {kind!r}: export it with --format hf")
    check_tokenizer(tokenizer)


def warn_of_window(config: Any, form: str) -> None:
    """Log that a format has no sliding windows, for a model whose layers have some."""
    window = getattr(config, "sliding_window", None)
    if window and window < config.max_position_embeddings:
        log.warning(
            "--format %s has no sliding window of %d tokens: longer texts are read without one there", form, window
        )


def write_gguf(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, file: Path, kind: str = "f16", *, name: str = ""
) -> str:
    """Write a model and its tokenizer as one GGUF file; return its architecture.

    Args:
        kind: type of the matrices, one of :data:`TYPES`; norms, biases and rows that no quantized block divides stay
            in float32 and float16.
        name: of the model, for the file's metadata.

    Raises:
        PrunerError: as :func:`check_writable`.
    """
    check_writable(model, tokenizer)
    warn_of_window(model.config, "gguf")
    assert tokenizer is not None
    layers = layer_shapes(model)
    arch = "deci" if len(set(layers)) > 1 else ARCHITECTURES[model.config.model_type]
    writer = gguf.GGUFWriter(file, arch, use_temp_file=True)
    writer.add_name(name or type(model).__name__)
    _add_sizes(writer, model, layers)
    add_tokenizer(writer, tokenizer, model.config.vocab_size)
    quantized = gguf.GGMLQuantizationType[TYPES[kind]]
    writer.add_file_type({"f32": 0, "f16": 1, "q8_0": 7}[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    unaligned = 0
    for tensor_name, values in _tensors(model, arch, layers):
        is_router = ".ffn_gate_inp." in tensor_name  # llama.cpp's converter does not round these either
        stored, as_asked = _store(values, gguf.GGMLQuantizationType.F32 if is_router else quantized)
        writer.add_tensor(tensor_name, *stored)
        unaligned += not as_asked
    if unaligned:
        log.info("%d matrices stay in float16: their rows are no multiple of a block of %s", unaligned, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return arch


def layer_shapes(model: PreTrainedModel) -> list[LayerShape]:
    """Return the sizes of every layer of a Llama-like model.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> layer_shapes(LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=12,
    ...                                           num_hidden_layers=1, num_attention_heads=2)))
    [LayerShape(heads=2, key_value_heads=2, neurons=12, experts=0)]
    """
    size, shapes = head_size(model.config), []
    for layer in stack_of(model.base_model, model.config.num_hidden_layers) or []:
        attention: Any = layer.self_attn
        mlp: Any = layer.mlp
        rows = (
            [0, 0] if isinstance(attention, Absent) else [p.out_features for p in (attention.q_proj, attention.k_proj)]
        )
        if hasattr(mlp, "experts"):
            experts, _, neurons = mlp.experts.down_proj.shape
        else:
            experts, neurons = 0, 0 if isinstance(mlp, Absent) else mlp.up_proj.out_features
        heads, key_value_heads = (part // size for part in rows)
        shapes.append(LayerShape(heads=heads, key_value_heads=key_value_heads, neurons=neurons, experts=experts))
    return shapes


def head_size(config: Any) -> int:
    """Return the channels of each attention head of a Llama-like model."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _rope(config: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, **(getattr(config, "rope_parameters", None) or {})}


def _add_sizes(writer: gguf.GGUFWriter, model: PreTrainedModel, layers: list[LayerShape]) -> None:
    config, differ = model.config, len(set(layers)) > 1
    neurons = [layer.neurons or (EMPTY_WIDTH if layer.heads else 0) for layer in layers]
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(len(layers))
    writer.add_vocab_size(config.vocab_size)
    writer.add_feed_forward_length(neurons if differ else neurons[0])
    writer.add_head_count([layer.heads for layer in layers] if differ else layers[0].heads)
    writer.add_head_count_kv([layer.key_value_heads for layer in layers] if differ else layers[0].key_value_heads)
    for add in (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count):
        add(head_size(config))
    if layers[0].experts:
        writer.add_expert_count(layers[0].experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(layers[0].neurons)
    if shared := getattr(config, "shared_expert_intermediate_size", None):
        writer.add_expert_shared_feed_forward_length(shared)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = _rope(config)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def _tensors(model: PreTrainedModel, arch: str, layers: list[LayerShape]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the tensors of a model in float32, by llama.cpp's names."""
    names = gguf.get_tensor_name_map({v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[arch], len(layers))
    tied = model.config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        number = next((int(part) for part in name.split(".") if part.isdecimal()), None)
        layer = None if number is None else layers[number]
        if (tied and name == "lm_head.weight") or _is_norm_of_absent(name, layer):
            continue
        values = tensor.detach().float().cpu().numpy()
        if arch in INTERLEAVED and layer is not None and ".self_attn." in name:
            heads = {"q_proj": layer.heads, "k_proj": layer.key_value_heads}.get(name.split(".")[-2])
            values = values if heads is None else _neighbouring_pairs(values, heads)
        for part, part_values in _parts(name, values):
            gguf_name = names.get_name(part, try_suffixes=(".weight", ".bias"))
            if gguf_name is None:
                raise PrunerError(f"--format gguf: llama.cpp's {arch} has no tensor for {part}")
            yield gguf_name, part_values
    for number, layer in enumerate(layers):
        if layer.heads and not layer.neurons:
            for part, shape in (("gate", (EMPTY_WIDTH, -1)), ("up", (EMPTY_WIDTH, -1)), ("down", (-1, EMPTY_WIDTH))):
                sizes = [model.config.hidden_size if size < 0 else size for size in shape]
                yield f"blk.{number}.ffn_{part}.weight", np.zeros(sizes, np.float32)
    if _rope(model.config)["rope_type"] == "llama3":
        yield "rope_freqs.weight", _llama3_factors(model.config)


def _parts(name: str, values: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the matrices of a tensor: two of the stack that has gate and up projections of experts, else one."""
    if name.endswith(".experts.gate_up_proj"):
        for part, half in zip(("gate", "up"), np.split(values, 2, axis=1), strict=True):
            yield name.replace("gate_up_proj", f"{part}_proj.weight"), half
    else:
        yield f"{name}.weight" if ".experts." in name else name, values


def _is_norm_of_absent(name: str, layer: LayerShape | None) -> bool:
    """Return True for the norm before a removed block, which `deci` does not have."""
    if layer is None:
        return False
    return (".input_layernorm." in name and not layer.heads) or (
        ".post_attention_layernorm." in name and not layer.neurons and not layer.heads
    )


def _neighbouring_pairs(values: np.ndarray, heads: int) -> np.ndarray:
    """Reorder rows of queries or keys so that channels that rotate together are neighbours, not half a head apart."""
    parts = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return parts.swapaxes(1, 2).reshape(values.shape)


def _llama3_factors(config: Any) -> np.ndarray:
    """Return what divides each rotary frequency under the scaling of Llama 3.1."""
    rope, size = _rope(config), head_size(config)
    longest = rope["original_max_position_embeddings"]
    waves = 2 * math.pi * rope["rope_theta"] ** (torch.arange(0, size, 2).double() / size)
    low, high = longest / rope["low_freq_factor"], longest / rope["high_freq_factor"]
    share = (longest / waves - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
    smooth = 1 / ((1 - share) / rope["factor"] + share)
    factors = torch.where(waves < high, 1.0, torch.where(waves > low, float(rope["factor"]), smooth))
    return factors.float().numpy()


def _store(values: np.ndarray, kind: gguf.GGMLQuantizationType) -> tuple[tuple[Any, ...], bool]:
    """Return the arguments that store a tensor, and whether it has the type that was asked for."""
    types = gguf.GGMLQuantizationType
    if values.ndim == 1 or kind == types.F32:
        return (values,), True
    if kind == types.F16 or values.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
        return (values.astype(np.float16),), kind == types.F16
    return (gguf.quants.quantize(values, kind), None, kind), True
