"""A model whose layers differ does all that a plain one does: beside it stands the same function, padded with zeros."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.models import build, pruned_by, tokens
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import llm_pruner as lp
from llm_pruner.surgery.uniform import to_uniform

NAMES = ["llama_grouped", "qwen3", "gpt2", "phi3"]


@pytest.fixture(params=NAMES)
def pair(request):
    """A pruned model whose layers differ, and a plain one that computes the same."""
    _, pruned = pruned_by(build(request.param), layers=[1])
    pruned.generation_config.eos_token_id = None
    return pruned, to_uniform(pruned)


@pytest.mark.parametrize(
    "how",
    [
        {"do_sample": False},
        {"do_sample": False, "use_cache": False},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": True, "top_k": 5},
        {"do_sample": False, "cache_implementation": "static"},
    ],
    ids=["greedy", "no cache", "beams", "sampled", "static cache"],
)
def test_generation(pair, how):
    ids = tokens(rows=3, length=6)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0  # a batch of different lengths, padded on the left
    written = []
    for model in pair:
        torch.manual_seed(0)
        written.append(model.generate(ids, attention_mask=mask, max_new_tokens=10, pad_token_id=0, **how))
    assert torch.equal(*written)


def test_save_pretrained_and_back(pair, tmp_path):
    model, _ = pair
    model.save_pretrained(tmp_path / "a")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32, device_map="cpu").eval()
    again.save_pretrained(tmp_path / "b", max_shard_size="20KB")
    third = AutoModelForCausalLM.from_pretrained(tmp_path / "b").eval()
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, third(tokens()).logits)


def test_device_map_auto(pair, tmp_path):
    model, _ = pair
    lp.save(model, None, tmp_path / "a")
    spread = AutoModelForCausalLM.from_pretrained(tmp_path / "a", device_map="auto").eval()
    with torch.no_grad():
        assert (spread(tokens().to(spread.device)).logits.cpu() - model(tokens()).logits).abs().max() < 1e-4


def losses(model, folder, **options):
    data = [{"input_ids": row, "labels": row} for row in tokens(8, 10)]
    settings = TrainingArguments(
        str(folder), max_steps=4, learning_rate=1e-2, logging_steps=1, report_to="none", use_cpu=True, **options
    )
    trainer = Trainer(model, settings, train_dataset=data)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training(pair, checkpointing, tmp_path):
    model, plain = pair
    found = losses(model.train(), tmp_path, gradient_checkpointing=checkpointing)
    expected = losses(plain.train(), tmp_path)
    assert found[0] == pytest.approx(expected[0], abs=0.1) and found[-1] < found[0] - 0.1


def test_gradients_are_those_of_the_plain_model(pair):
    gradients = []
    for model in pair:
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        gradients.append(model.get_input_embeddings().weight.grad)
    assert torch.allclose(*gradients, atol=1e-6)


def test_peft(pair, tmp_path):
    model, _ = pair
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    with torch.no_grad():
        expected = adapted(tokens()).logits
    adapted.save_pretrained(tmp_path / "adapter")
    base = adapted.unload()
    again = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.allclose(again(tokens()).logits, expected, atol=1e-6)
        assert torch.allclose(again.merge_and_unload()(tokens()).logits, expected, atol=1e-4)


def has_compiler():
    """Return True if there is a C++ compiler for ``torch.compile`` that starts."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    return compiler is not None and subprocess.run([compiler, "--version"], capture_output=True).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason="torch.compile needs a C++ compiler, and there is none")
def test_compile(pair):
    model, plain = pair
    compiled = torch.compile(model)
    with torch.no_grad():
        assert torch.allclose(compiled(tokens()).logits, plain(tokens()).logits, atol=1e-5)


def test_building_layers_of_their_own_widths_warns_of_nothing():
    """transformers says once in a process that a global value is read, so a new process is looked at."""
    code = (
        "import llm_pruner as lp; from helpers.models import build; model = build('llama'); graph = lp.trace(model);"
        "scores = lp.score(model, graph, criterion='l2');"
        "lp.apply(model, lp.select(graph, scores, 0.5, kinds=('neurons',), layers=[1]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent)
    assert (done.returncode, done.stderr) == (0, "")
