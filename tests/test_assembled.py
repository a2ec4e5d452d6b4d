"""Offloaded models whose checkpoints store every expert by itself."""

import pytest
import torch
from helpers.models import build, tokens
from safetensors import safe_open

import llm_pruner as lp
from llm_pruner.checkpoint import load as loading
from llm_pruner.cli import main


@pytest.fixture
def folder(tokenizer, tmp_path):
    """Save a tiny mixture as transformers does: with tensors for single experts."""
    model = build("mixtral", vocab_size=len(tokenizer))
    lp.save(model, tokenizer, tmp_path / "model")
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as file:
        assert any(".experts.0." in name for name in file.keys())  # noqa: SIM118
    return tmp_path / "model"


def test_stacks_of_experts_are_put_on_disk(folder, tmp_path, monkeypatch):
    placed = []
    original = loading.on_disk
    monkeypatch.setattr(loading, "on_disk", lambda where: lambda t: placed.append(t.shape) or original(where)(t))
    (tmp_path / "scratch").mkdir()
    model, offloaded = lp.load(str(folder))[0], lp.load(str(folder), offload_folder=tmp_path / "scratch")[0]
    stacks = [p.shape for name, p in model.named_parameters() if ".experts." in name]
    assert stacks and all(shape in placed for shape in stacks)
    state, other = model.state_dict(), offloaded.state_dict()
    assert state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)
    ids = tokens(2, 8)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, offloaded(ids).logits)


def test_weights_that_stay_as_they_are_stored_are_not_copied(tokenizer, tmp_path, monkeypatch):
    lp.save(build("llama", vocab_size=len(tokenizer)), tokenizer, tmp_path / "model")
    monkeypatch.setattr(loading, "read_assembled", None)
    lp.load(str(tmp_path / "model"), offload_folder=tmp_path)


def test_experts_are_scored_offloaded(folder, home_text, tmp_path):
    command = ["prune", str(folder), "--kinds", "experts", "--pruning_ratio", "0.25", "--pruner_type", "reap"]
    command += ["--refit", "none", "--calib_dataset", str(home_text), "--num_examples", "4", "--calib_seq_len", "16"]
    command += ["--eval_datasets", "", "--quiet", "--output"]
    plans = []
    for name, more in (("memory", []), ("offloaded", ["--stream"])):
        assert main([*command, str(tmp_path / name), *more]) == 0
        units = lp.PruningPlan.load(tmp_path / name / "pruning_plan.json").units
        plans.append({unit: choice.kept.tolist() for unit, choice in units.items()})
        assert lp.load(str(tmp_path / name))[0].config.num_local_experts == 3
    assert plans[0] == plans[1]
