"""Dry runs predict what the stages of a recipe leave, and show what cannot be predicted as unknown."""

import json
import re
from collections import Counter

import pytest
from helpers.recipes import FOUR_STAGES, PRUNE, printed_table, save_config, write_recipe

from llm_pruner.checkpoint.config import load_config
from llm_pruner.cli import main
from llm_pruner.recipes import dry_run
from llm_pruner.recipes.arguments import RunArguments
from llm_pruner.recipes.recipe import read
from llm_pruner.recipes.run import run_recipe
from llm_pruner.recipes.source import LIBRARY

LLAMA_13B = {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "vocab_size": 32000,
}
T5_XL = {
    "d_model": 2048,
    "d_ff": 5120,
    "num_layers": 24,
    "num_decoder_layers": 24,
    "num_heads": 32,
    "d_kv": 64,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
LLAMA_3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
QWEN3_30B = {
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
}
CONFIGS = {
    "llm_pruner_llama7b": ("llama", {"vocab_size": 32000}),
    "pruning_llms_7b_to_3.4b": ("llama", LLAMA_13B),
    "openba_v2_5_stages": ("t5", T5_XL),
    "minitron_style": ("llama", LLAMA_3_8B),
    "reap_qwen3_30b": ("qwen3_moe", QWEN3_30B),
    "llmpruner_bloom_zh": ("bloom", {"hidden_size": 1024, "n_layer": 24, "n_head": 16, "vocab_size": 250880}),
}
PUBLISHED_SIZES = {
    "llm_pruner_llama7b": {"prune": 5_422_977_024},
    "pruning_llms_7b_to_3.4b": {"to-7b": 6_738_415_616},
}
PARAMETERS = -4  # column of a dry run


def predict(recipe, capsys, *flags):
    assert main(["run", str(recipe), "--dry_run", *flags]) == 0
    return printed_table(capsys.readouterr().out)


@pytest.mark.slow
def test_predicted_sizes_are_those_of_the_run(home, home_text, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(FOUR_STAGES.format(home=home, out=tmp_path / "out"))
    assert run_recipe(RunArguments(recipe=str(recipe), dry_run=True)) is None
    assert not (tmp_path / "out").exists()
    predicted = printed_table(capsys.readouterr().out)
    out = run_recipe(RunArguments(recipe=str(recipe)))
    rows = {row["stage"]: row for row in json.loads((out / "results.json").read_text())}
    assert not any(predicted["recover"])
    for stage in ("original", "depth", "width", "vocab"):
        assert int(predicted[stage][PARAMETERS].replace(",", "")) == rows[stage]["parameters"]


@pytest.mark.parametrize(
    "budget",
    ["target_latency: 30ms", "target_latency: 30ms, num_layers: 2", "target_latency: 30ms, kinds: [heads, neurons]"],
)
def test_an_absolute_latency_makes_that_stage_and_later_ones_unknown(home, tmp_path, budget, capsys):
    stages = f"  - prune: {{name: timed, {budget}}}\n  - recover: {{data_path: x}}\n{PRUNE}"
    table = predict(write_recipe(tmp_path, home, stages), capsys)
    assert table["timed"] == table["prune"] == ["?"] * 9
    assert table["recover"] == [""] * 9 and "?" not in table["original"]


def test_tables_fit_eighty_columns_and_the_hidden_size_is_that_of_the_config(home, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["run", str(write_recipe(tmp_path, home, PRUNE)), "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80 and printed.count("ratio") == 2
    assert f"hidden {load_config(home / 'base').hidden_size}," in printed


ALL_LAYERS = ", ".join(f"block_{block}_layer_start: 0, block_{block}_layer_end: 3" for block in ("attention", "mlp"))


@pytest.mark.parametrize(
    ("share", "more"), [(0.95, ""), (0.7, ", num_layers: 2"), (0.8, f", kinds: [neurons], {ALL_LAYERS}")]
)
def test_a_share_of_the_latency_is_estimated_as_the_same_share_of_macs(home, tmp_path, share, more, capsys):
    settings = f"compensate: none, hardware_align: false, budget_tokens: 128, target_latency: {share}{more}"
    table = predict(write_recipe(tmp_path, home, f"  - prune: {{{settings}}}\n"), capsys)
    assert table["prune"][-1].startswith("~") and share - 0.01 < float(table["prune"][-1].lstrip("~")) <= share


LONG = {"openba_v2_5_stages", "pruning_llms_7b_to_3.4b"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in LONG else n for n in sorted(CONFIGS)])
def test_every_recipe_can_be_predicted_on_the_config_of_its_model(name, tmp_path, capsys):
    kind, fields = CONFIGS[name]
    model = save_config(tmp_path / "model", kind, **fields)
    table = predict(f"recipes/{name}.yaml", capsys, "--model", str(model))
    for stage, parameters in PUBLISHED_SIZES.get(name, {}).items():
        assert int(table[stage][PARAMETERS].replace(",", "")) == parameters


def test_every_recipe_has_a_config():
    assert {path.stem for path in LIBRARY.glob("*.yaml")} == {*CONFIGS, "smollm2_demo"}
    read("smollm2_demo")


@pytest.fixture
def wide(monkeypatch):
    """Print every table in one part."""
    monkeypatch.setenv("COLUMNS", "200")


def sweep_table(printed):
    """Return the head and the rows of a sweep's table."""
    heads = [line.split("┃")[1:-1] for line in printed.splitlines() if line.startswith("┃")]
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if line[:1] == "│"]
    return [" ".join("".join(cells).split()) for cells in zip(*heads, strict=True)], rows


SWEEP = """sweep:
  grid: {prune.pruner_type: [l1, taylor], prune.pruning_ratio: [0.25, 0.5]}
seeds: [1, 2, 3]
"""


def test_a_sweep_has_a_row_per_point_and_folds_its_seeds(home, tmp_path, capsys, monkeypatch, wide):
    calls = Counter()
    for name in ("load_config", "meta_model", "make_plan"):
        original = getattr(dry_run, name)
        monkeypatch.setattr(
            dry_run, name, lambda *args, name=name, call=original: (calls.update([name]), call(*args))[1]
        )
    stages = "  - prune: {compensate: none, hardware_align: false}\n  - recover: {data_path: python-docs}\n"
    assert main(["run", str(write_recipe(tmp_path, home, stages, SWEEP)), "--dry_run"]) == 0
    printed = capsys.readouterr().out
    head, rows = sweep_table(printed)
    assert re.search(
        r"^the same in every row: layers \d+, hidden \d+, heads \d+, vocabulary \d+$", printed, re.MULTILINE
    )
    assert head[:4] == ["pruner_type", "pruning_ratio", "seeds", "neurons"] and head[-2].startswith("MACs")
    assert [row[:3] for row in rows] == [[c, r, "3"] for c in ("l1", "taylor") for r in ("0.25", "0.5")]
    assert rows[0][3:] == rows[2][3:] != rows[1][3:] == rows[3][3:]
    assert calls == {"load_config": 1, "meta_model": 1, "make_plan": 2}  # one for each ratio
    single = predict(write_recipe(tmp_path, home, stages.replace("none", "none, pruning_ratio: 0.25")), capsys)
    assert single["prune"] == rows[0][3:]


def test_a_sweep_shows_why_points_cannot_run_and_ends_with_2(home, tmp_path, capsys, wide):
    stages = "  - prune: {pruner_type: l2, compensate: none, hardware_align: false}\n"
    sweep = "sweep: {points: [{prune.num_layers: 2}, {prune.num_layers: 7}, {prune.pruning_ratio: 1.5}]}\n"
    assert main(["run", str(write_recipe(tmp_path, home, stages, sweep)), "--dry_run"]) == 2
    printed, error = capsys.readouterr()
    head, rows = sweep_table(printed)
    assert head[:3] == ["num_layers", "pruning_ratio", "layers"]
    assert [row[:2] for row in rows] == [["2", ""], ["7", ""], ["", "1.5"]]
    assert [bool(row[2]) for row in rows] == [True, False, False]
    problems = [line for line in printed.splitlines() if line.startswith("cannot work: ")]
    assert ["run 2: num_layers 7: " in problems[0], "run 3: pruning_ratio 1.5: " in problems[1]] == [True, True]
    assert "2 of 3 runs cannot work; the first is run 2: num_layers 7" in error and "recipe.yaml:5" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_sweep_is_predicted_point_by_point(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "240")
    model = save_config(tmp_path / "model", "llama", vocab_size=32000, num_hidden_layers=32)
    assert main(["run", "paper/llama7b_20", "--model", str(model), "--dry_run"]) == 0
    assert "3296" in capsys.readouterr().out  # hidden size of the point that prunes channels
