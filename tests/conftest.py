"""Tiny models of the main families, made here, and the embedded one."""

from __future__ import annotations

import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch
from helpers.media import save_llava
from helpers.models import ARCHITECTURES, SHARED, require_embedded_model
from helpers.tasks import write_tasks
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import llm_pruner as lp
from llm_pruner.data import documents
from llm_pruner.recovery.prompts import ALPACA

settings.register_profile("ci", derandomize=True)  # a commit is judged by what it changes, not by chance
if os.environ.get("CI"):
    settings.load_profile("ci")


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def smollm2():
    """The embedded model and its tokenizer (dequantizing takes some seconds, so once)."""
    require_embedded_model()
    return lp.load("smollm2-135m")


CHAT = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<s>assistant: {% endif %}"  # noqa: E501


@pytest.fixture(scope="session")
def tokenizer():
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.decoder = decoders.ByteLevel()
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    texts = [text for _, text in zip(range(40), documents("python-docs"), strict=False)]
    texts += [*ALPACA.values(), "This is 1 times 2."] * 300  # so that prompts are short
    inner.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    )
    out = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    out.chat_template = CHAT
    return out


@pytest.fixture(scope="session")
def home(tokenizer, tmp_path_factory):
    """A folder with ``base``, ``pruned`` (widths differ by layer), ``uniform`` and ``data.jsonl``."""
    folder = tmp_path_factory.mktemp("recovery")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config).eval()
    lp.save(model, tokenizer, folder / "base")
    graph = lp.trace(model)
    scores = lp.score(model, graph, criterion="l2")
    for name, layers in (("pruned", [1]), ("uniform", None)):
        plan = lp.select(graph, scores, 0.5, kinds=("neurons",), layers=layers)
        plan.settings["base_model"] = str(folder / "base")
        lp.save(lp.apply(model, plan), tokenizer, folder / name, plan=plan)
    with (folder / "data.jsonl").open("w") as file:
        for i in range(60):
            row = {"instruction": f"Say {i}.", "input": "" if i % 2 else "now", "output": f"This is {i} times {i % 7}."}
            file.write(json.dumps(row) + "\n")
    return folder


@pytest.fixture(scope="session")
def home_text(home) -> Path:
    """``text.txt`` in the same folder, some hundred lines of English."""
    lines = [line for _, text in zip(range(10), documents("python-docs"), strict=False) for line in text.splitlines()]
    (home / "text.txt").write_text("\n".join(lines))
    return home / "text.txt"


@pytest.fixture
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip(f"the measuring data is not here ({SHARED})")
    return SHARED


@pytest.fixture
def llava(tokenizer, tmp_path) -> Path:
    """A folder with a tiny model of images and text, and its processor."""
    return save_llava(tokenizer, tmp_path / "llava")


@pytest.fixture(scope="session")
def tasks(tmp_path_factory) -> Path:
    """A folder with tasks for lm-eval."""
    return write_tasks(tmp_path_factory.mktemp("tasks"))
