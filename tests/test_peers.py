"""The comparison with other tools: sizes are solved, outputs described by their shapes, results tabulated."""

import importlib
import json
from pathlib import Path

import pytest
import torch

import llm_pruner as lp
from llm_pruner.models.skeleton import parameter_count

UNPRUNED = {"model": "m", "tool": "unpruned", "parameters": 1000, "perplexity": {"a": 2.0}}
ROW = {"model": "m", "target": 0.8, "calibration": "none", "parameters": 801, "perplexity": {"a": 3.0}}


@pytest.fixture
def peers(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[1] / "benchmarks" / "peers")
    return importlib.import_module


def test_a_checkpoint_is_described_by_its_shapes(peers, home, tmp_path):
    """The config of the original, and a pruned model's weights, as the other tools' scripts leave them."""
    pruned, _ = lp.load(str(home / "pruned"))
    pruned.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((home / "base" / "config.json").read_text())
    peers("compare").describe_layers(tmp_path)
    described, _ = lp.load(str(tmp_path))
    ids = torch.arange(8)[None]
    assert torch.equal(described(ids).logits, pruned(ids).logits)
    assert "per_layer_config" in json.loads((tmp_path / "config.json").read_text())


def test_the_sizes_of_other_tools_follow_their_rounding(peers, home):
    """Three layers of 2 key-value heads and 64 neurons; LLM-Pruner removes n - int(n * (1 - ratio)) channels."""
    model, _ = lp.load(str(home / "base"))
    size, runner, script = parameter_count(model), peers("runner"), peers("run_llmpruner")
    removed = size - script.parameters_at(model, model.model.layers[:1], 0.5)
    assert removed == 32 * 3 * 32 + 8 * 32 * 2 * (2 + 1), "half of the neurons; one group of two query heads"
    assert runner.closest_ratio(lambda ratio: int(size * (1 - ratio)), 0.8, size) == pytest.approx(0.2)


def test_the_table_compares_with_the_reference(peers):
    compare = peers("compare")
    cost = {"step_seconds": 10.0, "peak_gib": 1.5}
    records = [UNPRUNED, ROW | cost | {"row": compare.REFERENCE, "tool": "LLM-Pruner"}]
    records += [ROW | cost | {"row": "llm-pruner paper", "tool": "llm-pruner", "step_seconds": 5.0}]
    records += [{"model": "m", "target": 0.8, "row": "Torch-Pruning width", "tool": "Torch-Pruning", "error": "hangs"}]
    lines = compare.table(records).splitlines()
    assert lines[3] == "| m | LLM-Pruner param_first | none | 0.8010 | 3.0 | 10.0 (1.00) | 1.50 |"
    assert "5.0 (0.50)" in lines[4] and "hangs" in lines[5]
    assert len({line.count("|") for line in lines}) == 1


def test_the_page_of_results_shows_the_results(peers):
    root = Path(__file__).resolve().parents[1]
    records = json.loads((root / "benchmarks" / "results" / "peers.json").read_text())["rows"]
    assert peers("compare").table(records) in (root / "docs" / "results.md").read_text()
