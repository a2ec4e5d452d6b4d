"""Tiny quantized checkpoints, made by the definitions of their formats, and the values that they stand for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from helpers.architectures import perturbed

FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
MODELS = {
    "qwen3": {"head_dim": 32},
    "qwen3_moe": {
        "head_dim": 32,
        "moe_intermediate_size": 64,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    },
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "moe_intermediate_size": 64,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
    },
    "gpt_oss": {
        "intermediate_size": 64,
        "head_dim": 16,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "sliding_window": 16,
    },
}


def unquantized(name: str, folder: Path, **changes: object) -> PreTrainedModel:
    """Save a tiny random model as an unquantized checkpoint in bfloat16."""
    config = AutoConfig.for_model(name, **(SIZES | MODELS[name] | changes))
    model = perturbed(AutoModelForCausalLM, config, 0).to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.save_pretrained(folder)
    return model


def quantized(source: Path, target: Path, how: str) -> dict[str, torch.Tensor]:
    """Quantize a checkpoint; return the values of all of its tensors in float32, by unquantized names."""
    config, encode = FORMATS[how]
    tensors = load_file(source / "model.safetensors")
    target.mkdir()
    for file in source.glob("*.json"):
        shutil.copyfile(file, target / file.name)
    written, values = {}, {}
    for name, tensor in tensors.items():
        stored = encode(name, tensor.float()) if _is_quantized(name, tensor, how) else None
        if stored is None:
            written[name], values[name] = tensor, tensor.float()
        else:
            parts, values[name] = stored
            written |= {key: part.contiguous() for key, part in parts.items()}
    save_file(written, target / "model.safetensors", metadata={"format": "pt"})
    document = json.loads((target / "config.json").read_text())
    skipped = sorted({n.removesuffix(".weight") for n, t in tensors.items() if "gate.weight" in n})
    listed = json.dumps(["lm_head", *skipped])[1:-1]
    document["quantization_config"] = json.loads(json.dumps(config).replace('"lm_head"', listed))
    (target / "config.json").write_text(json.dumps(document))
    return values


def _is_quantized(name: str, tensor: torch.Tensor, how: str) -> bool:
    if how == "mxfp4":
        return name.endswith(("experts.gate_up_proj", "experts.down_proj"))
    linear = tensor.ndim == 2 and name.endswith("_proj.weight")
    return linear or (tensor.ndim == 2 and "a_proj_with_mqa" in name)


def repeated(scale: torch.Tensor, rows: int, columns: int, shape: torch.Size) -> torch.Tensor:
    return torch.kron(scale, torch.ones(rows, columns))[: shape[0], : shape[1]]


def largest(tensor: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """The largest magnitude of every block."""
    height, width = -(-tensor.shape[0] // rows), -(-tensor.shape[1] // columns)
    padded = torch.zeros(height * rows, width * columns)
    padded[: tensor.shape[0], : tensor.shape[1]] = tensor.abs()
    return padded.view(height, rows, width, columns).amax((1, 3)).clamp_min(1e-6)


def fp8(rows, columns, suffix):
    def encode(name, tensor):
        height, width = rows or tensor.shape[0], columns or tensor.shape[1]
        scale = largest(tensor, height, width) / 448
        spread = repeated(scale, height, width, tensor.shape)
        stored = (tensor / spread).to(torch.float8_e4m3fn)
        kept = scale.reshape(()) if suffix == "_scale_inv" and rows is None and columns is None else scale
        return {name: stored, name + suffix: kept}, stored.float() * spread

    return encode


def int8(name, tensor):
    scale = (largest(tensor, 1, tensor.shape[1]) / 127).bfloat16()
    stored = (tensor / scale.float()).round().clamp(-128, 127).to(torch.int8)
    return {name: stored, name + "_scale": scale}, stored.float() * scale.float()


def pack(integers: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack unsigned integers along the last dim, lowest bits first."""
    per = 32 // bits
    padded = torch.zeros(integers.shape[0], -(-integers.shape[1] // per) * per, dtype=torch.int64)
    padded[:, : integers.shape[1]] = integers
    words = sum(padded[:, i::per] << (bits * i) for i in range(per))
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def int4(group, symmetric):
    def encode(name, tensor):
        module = name.removesuffix(".weight")
        low, high = tensor.view(len(tensor), -1, group).aminmax(dim=-1)
        scale = (
            ((2 * torch.maximum(low.abs(), high.abs()) if symmetric else high - low) / 15).clamp_min(1e-6).bfloat16()
        )
        wide = scale.float()
        zero = torch.zeros_like(wide) if symmetric else (-8 - low / wide).round().clamp(-8, 7)
        spread = [repeated(t, 1, group, tensor.shape) for t in (wide, zero)]
        stored = (tensor / spread[0] + spread[1]).round().clamp(-8, 7)
        parts = {"weight_packed": pack(stored.long() + 8, 4), "weight_scale": scale}
        parts["weight_shape"] = torch.tensor(tensor.shape)
        if not symmetric:
            parts["weight_zero_point"] = pack(zero.long().T + 8, 4).T
        return {f"{module}.{key}": part for key, part in parts.items()}, (stored - spread[1]) * spread[0]

    return encode


def to_fp4(tensor: torch.Tensor) -> torch.Tensor:
    """The four bits of the nearest 4-bit floats."""
    nearest = (tensor.abs().unsqueeze(-1) - FP4).abs().argmin(-1)
    return (nearest + 8 * (tensor < 0)).to(torch.uint8)


def of_fp4(bits: torch.Tensor) -> torch.Tensor:
    return FP4[(bits & 7).long()] * torch.where(bits > 7, -1.0, 1.0)


def nvfp4(name, tensor):
    module = name.removesuffix(".weight")
    overall = 448 * 6 / tensor.abs().max()
    scale = (largest(tensor, 1, 16) / 6 * overall).to(torch.float8_e4m3fn)
    spread = repeated(scale.float() / overall, 1, 16, tensor.shape)
    bits = to_fp4(tensor / spread)
    parts = {
        f"{module}.weight_packed": bits[:, ::2] | bits[:, 1::2] << 4,
        f"{module}.weight_scale": scale,
        f"{module}.weight_global_scale": overall.reshape(1),
        f"{module}.input_global_scale": torch.ones(1),
    }
    return parts, of_fp4(bits) * spread


def rows_of_mxfp4(name, tensor):
    """A weight in blocks along its inputs, as compressed-tensors stores it."""
    parts, values = mxfp4(name, tensor.T[None])
    blocks, scales = parts.values()
    module = name.removesuffix(".weight")
    return {f"{module}.weight_packed": blocks[0].flatten(1), f"{module}.weight_scale": scales[0]}, values[0].T


def mxfp4(name, tensor):
    """Stacked experts ``[experts, in, out]``, in blocks along ``in``."""
    turned = tensor.transpose(1, 2)
    blocks = turned.reshape(*turned.shape[:2], -1, 32)
    exponent = (blocks.abs().amax(-1).clamp_min(1e-6) / 6).log2().ceil()
    bits = to_fp4(blocks / exponent.exp2().unsqueeze(-1))
    parts = {
        name + "_blocks": bits[..., ::2] | bits[..., 1::2] << 4,
        name + "_scales": (exponent + 127).to(torch.uint8),
    }
    values = of_fp4(bits) * exponent.exp2().unsqueeze(-1)
    return parts, values.reshape(turned.shape).transpose(1, 2)


def grouped(tensor, group):
    """Integers 0 to 15 ``[outputs, inputs]``, scales and zero points ``[outputs, groups]``."""
    low, high = tensor.view(len(tensor), -1, group).aminmax(dim=-1)
    scale = ((high - low) / 15).clamp_min(1e-6).half()
    zero = (-low / scale.float()).round().clamp(1, 15)
    spread = [repeated(t, 1, group, tensor.shape) for t in (scale.float(), zero)]
    integers = (tensor / spread[0] + spread[1]).round().clamp(0, 15)
    return integers.long(), scale, zero.long(), (integers - spread[1]) * spread[0]


def gptq(ordered):
    def encode(name, tensor):
        module, group = name.removesuffix(".weight"), 32
        order = torch.randperm(tensor.shape[1], generator=torch.Generator().manual_seed(0))
        order = order if ordered else torch.arange(tensor.shape[1])
        integers, scale, zero, values = grouped(tensor[:, order], group)
        index = torch.empty(len(order), dtype=torch.int32)
        index[order] = torch.arange(len(order), dtype=torch.int32) // group
        back = order.argsort()
        parts = {
            "qweight": pack(integers[:, back], 4).T,
            "qzeros": pack(zero.T - 1, 4),
            "scales": scale.T,
            "g_idx": index,
        }
        return {f"{module}.{key}": part for key, part in parts.items()}, values[:, back]

    return encode


def awq(name, tensor):
    module, group = name.removesuffix(".weight"), 32
    integers, scale, zero, values = grouped(tensor, group)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])

    def packed(numbers):
        return pack(numbers.view(len(numbers), -1, 8)[:, :, order].flatten(1), 4)

    parts = {"qweight": packed(integers.T), "qzeros": packed(zero.T), "scales": scale.T}
    return {f"{module}.{key}": part for key, part in parts.items()}, values


def compressed(form: str, **weights: object) -> dict:
    scheme = {"symmetric": True, "dynamic": False, "observer": "minmax"} | weights
    group = {"targets": ["Linear"], "weights": scheme, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def fine_grained(blocks: list[int] | None) -> dict:
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": blocks,
        "modules_to_not_convert": ["lm_head"],
    }


FORMATS = {
    "fp8": (fine_grained([16, 16]), fp8(16, 16, "_scale_inv")),
    "fp8_tensor": (fine_grained(None), fp8(None, None, "_scale_inv")),
    "mxfp4": ({"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, mxfp4),
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}, gptq(False)),
    "gptq_ordered": ({"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "sym": False}, gptq(True)),
    "awq": (
        {
            "quant_method": "awq",
            "bits": 4,
            "group_size": 32,
            "version": "gemm",
            "zero_point": True,
            "modules_to_not_convert": ["lm_head"],
        },
        awq,
    ),
    "ct_fp8_channel": (
        compressed("float-quantized", num_bits=8, type="float", strategy="channel"),
        fp8(1, None, "_scale"),
    ),
    "ct_fp8_tensor": (
        compressed("float-quantized", num_bits=8, type="float", strategy="tensor"),
        fp8(None, None, "_scale"),
    ),
    "ct_fp8_block": (
        compressed("float-quantized", num_bits=8, type="float", strategy="block", block_structure=[16, 16]),
        fp8(16, 16, "_scale"),
    ),
    "ct_int8": (compressed("int-quantized", num_bits=8, type="int", strategy="channel"), int8),
    "ct_int4": (
        compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32),
        int4(32, True),
    ),
    "ct_int4_zero": (
        compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=16, symmetric=False),
        int4(16, False),
    ),
    "ct_mxfp4": (
        compressed("mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32),
        rows_of_mxfp4,
    ),
    "ct_nvfp4": (
        compressed("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16),
        nvfp4,
    ),
}
