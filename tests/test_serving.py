"""Serving: refusals of the vLLM plugin, and log-probabilities of the real engine if it is installed.

vLLM pins another transformers than this environment: VLLM_PYTHON may name the interpreter of an environment of its own,
with llm_pruner installed in it.
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
from helpers.architectures import perturbed, tiny_model
from helpers.models import build, pruned_by
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

import llm_pruner as lp
from llm_pruner.checkpoint.engines import why_not_vllm
from llm_pruner.graph.blocks import block_of
from llm_pruner.models.per_layer import has_per_layer_widths
from llm_pruner.serving.vllm_plugin import indivisible

NEW_TOKENS = 8

# Continues prompts greedily, in an environment with vLLM: sys.argv is folder, prompts, file to write and new tokens.
CONTINUE = """
import json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    prompts = [{"prompt_token_ids": ids} for ids in json.loads(sys.argv[2])]
    engine = LLM(sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=64, skip_tokenizer_init=True,
                 trust_remote_code=bool(sys.argv[5]))
    settings = SamplingParams(temperature=0, max_tokens=int(sys.argv[4]), logprobs=1, ignore_eos=True, detokenize=False)
    found = [request.outputs[0] for request in engine.generate(prompts, settings, use_tqdm=False)]
    rows = [[list(o.token_ids), [d[t].logprob for t, d in zip(o.token_ids, o.logprobs)]] for o in found]
    json.dump(rows, open(sys.argv[3], "w"))
"""


@pytest.fixture(scope="module")
def vllm_python():
    named = os.environ.get("VLLM_PYTHON", sys.executable if importlib.util.find_spec("vllm") else "")
    if not named:
        pytest.skip("vLLM is not installed here, and VLLM_PYTHON names no environment with it")
    return named


def continued_by_vllm(python, folder, prompts, file, trust_remote_code=False):
    """Return, for every prompt, the new tokens and their log-probabilities."""
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING", "PYTHONPATH": ""}
    command = [
        python,
        "-c",
        CONTINUE,
        str(folder),
        json.dumps(prompts),
        str(file),
        str(NEW_TOKENS),
        "trust" * trust_remote_code,
    ]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=file.parent, timeout=280)
    assert run.returncode == 0, "\n".join(line for line in (run.stdout + run.stderr).splitlines() if "rror" in line)[
        -3000:
    ]
    return json.loads(file.read_text())


@torch.no_grad()
def expected_of(model, prompts):
    rows = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        whole = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0)
        tokens = whole[0, len(prompt) :]
        found = model(whole).logits.log_softmax(-1)[0, len(prompt) - 1 : -1].gather(1, tokens[:, None])[:, 0]
        rows.append([tokens.tolist(), found.tolist()])
    return rows


def made(name, kinds, gone=None, model=None):
    """Return a pruned model whose second layer differs, and its plan.

    Args:
        gone: kind of unit whose block is removed, by layer.
    """
    wide = {"hidden_size": 128, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    if model is None:
        model = build(name, **wide, head_dim=32, vocab_size=128, num_hidden_layers=3, initializer_range=0.2)
    graph = lp.trace(model)
    plan = lp.select(graph, lp.score(model, graph, criterion="l2"), 0.5, kinds=kinds, layers=[1])
    for layer, kind in (gone or {}).items():
        plan.drop_block(block_of(model, graph, "model.layers", layer, kind=kind), graph.shapes)
    return lp.apply(model, plan), plan


def served_as_expected(vllm_python, tmp_path, *model_and_plan):
    pruned, plan = model_and_plan
    lp.save(pruned, None, tmp_path / "model", plan)
    prompts = torch.randint(3, 128, (20, 12), generator=torch.Generator().manual_seed(0)).tolist()
    found = continued_by_vllm(vllm_python, tmp_path / "model", prompts, tmp_path / "found.json")
    for (tokens, values), (expected_tokens, expected_values) in zip(found, expected_of(pruned, prompts), strict=True):
        assert tokens == expected_tokens
        assert values == pytest.approx(expected_values, abs=1e-3)


def test_vllm_serves_layers_that_differ(vllm_python, tmp_path):
    served_as_expected(vllm_python, tmp_path, *made("llama_grouped", ("heads", "neurons")))


@pytest.mark.slow
@pytest.mark.parametrize("block", ["heads", "neurons"])
def test_vllm_serves_models_without_some_blocks(vllm_python, tmp_path, block):
    served_as_expected(vllm_python, tmp_path, *made("llama_grouped", ("neurons",), {2: block}))


@pytest.mark.slow
def test_vllm_serves_layers_with_fewer_experts(vllm_python, tmp_path):
    served_as_expected(vllm_python, tmp_path, *made("mixtral", ("experts",)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "olmoe"])
def test_stock_vllm_serves_fewer_experts(vllm_python, tmp_path, name):
    """As many in every layer: an ordinary checkpoint of its class."""
    wide = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32}
    experts = {"num_local_experts": 4, "num_experts": 4, "intermediate_size": 64, "moe_intermediate_size": 64}
    few = {"vocab_size": 128, "num_hidden_layers": 3, "num_experts_per_tok": 2, "initializer_range": 0.2}
    model = perturbed(AutoModelForCausalLM, AutoConfig.for_model(name, **wide, **experts, **few))
    graph, ids = lp.trace(model), torch.randint(3, 128, (8, 12), generator=torch.Generator().manual_seed(1))
    plan = lp.select(graph, lp.score(model, graph, ids, "reap", kinds=["experts"]), 0.5, kinds=["experts"])
    pruned = lp.apply(model, plan)
    assert not has_per_layer_widths(pruned.config)
    served_as_expected(vllm_python, tmp_path, pruned, plan)


def test_devices_that_cannot_share_a_layer_are_refused():
    config = LlamaConfig(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, intermediate_size=64)
    assert indivisible(config, 2) == ""
    pruned, _ = made("llama_grouped", ("heads",))
    assert indivisible(pruned.config, 1) == ""
    assert "layer 1 has num_key_value_heads 1; prune with --tensor_parallel 2" in indivisible(pruned.config, 2)


def test_models_that_the_backend_would_get_wrong_are_refused():
    _, bloom = pruned_by(tiny_model("bloom"), kinds=("heads",), layers=[1])
    assert "constants of their own" in why_not_vllm(bloom.config)
    _, gpt2 = pruned_by(build("gpt2"), kinds=("heads",), layers=[1])
    assert "llm-pruner to-uniform makes a plain checkpoint" in why_not_vllm(gpt2.config)
    _, llama = pruned_by(build("llama_grouped"), kinds=("heads", "neurons"), layers=[1])
    assert why_not_vllm(llama.config) == ""
