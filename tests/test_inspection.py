"""``llm-pruner inspect``: its output for a model and for a plan."""

import json
import re

import pytest
import torch
from helpers.models import ARCHITECTURES, build, require_embedded_model
from transformers import DecisionTransformerConfig

import llm_pruner as lp
from llm_pruner.cli import main
from llm_pruner.selection.plan import removed_share


@pytest.fixture(scope="module")
def half_dead(tmp_path_factory):
    """A model with layers in which permuting heads or neurons has no effect."""
    model = build("llama_grouped")
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[1].mlp.down_proj.weight.zero_()
    folder = tmp_path_factory.mktemp("half_dead")
    lp.save(model, None, folder / "model")
    return folder / "model"


def test_counts_of_the_permutation_test_agree_with_the_table(half_dead, capsys):
    assert main(["inspect", str(half_dead), "--verify", "--layer", "-1"]) == 0
    output = capsys.readouterr().out
    passed, tested, frozen = map(
        int, re.search(r"(\d+) of (\d+) tested units pass, (\d+) are frozen by the test", output).groups()
    )
    untested = sum(map(int, re.findall(r"(\d+) \w+", output.split("indices matters:")[1].splitlines()[0])))
    assert passed + frozen == tested and frozen >= 2
    assert int(re.search(r"(\d+) prunable units", output)[1]) == passed + untested
    assert main(["inspect", str(half_dead), "--verify", "--json"]) == 0
    document = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert sum("permutation_difference" in unit for unit in document["units"]) == passed
    failed = [unit["name"] for unit in document["frozen"] if "permutation_difference" in unit]
    assert len(failed) == frozen and all(f"  {name}: permuting it" in output for name in failed)


@pytest.fixture
def plan(home, tmp_path):
    file = tmp_path / "plan.json"
    file.write_text((home / "uniform" / "pruning_plan.json").read_text())
    return file


def test_a_plan_is_checked_by_its_hash(plan, capsys):
    assert main(["inspect", str(plan), "--verify"]) == 0
    assert "the plan was checked" in capsys.readouterr().out
    assert main(["inspect", str(plan)]) == 0
    assert "checked" not in capsys.readouterr().out


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_a_forged_plan_is_refused(flags, plan, capsys):
    document = json.loads(plan.read_text())
    document["settings"]["base_model"] = "another"
    plan.write_text(json.dumps(document))
    assert main(["inspect", str(plan), *flags]) == 0
    assert main(["inspect", str(plan), "--verify", *flags]) == 2
    assert "was changed after it was written" in capsys.readouterr().err


WORDS = re.compile(r"[\w*]+(?:\[\d\])?")


def words(text):
    return set(WORDS.findall(text))


def inspect(*argv, columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["inspect", *map(str, argv)]) == 0
    return capsys.readouterr().out


def assert_fits(*argv, **fixtures):
    """Tables are within 80 columns, and have the words that they have in 300."""
    narrow, wide = (inspect(*argv, columns=columns, **fixtures) for columns in (80, 300))
    assert max(map(len, narrow.splitlines())) <= 80
    assert words(narrow) == words(wide)


def pruned_folder(name, folder):
    model = build(name)
    graph = lp.trace(model)
    kinds = [kind for kind in ("heads", "neurons") if graph.of_kind(kind)]
    plan = lp.select(graph, lp.score(model, graph, criterion="l1", kinds=kinds), 0.5, kinds, layers=[0, 2])
    plan.settings["base_model"] = name
    lp.save(lp.apply(model, plan), None, folder, plan=plan)
    return plan


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tables_fit_eighty_columns(name, tmp_path, monkeypatch, capsys):
    pruned_folder(name, tmp_path / name)
    assert_fits(tmp_path / name, "--layer", "-1", monkeypatch=monkeypatch, capsys=capsys)
    assert_fits(tmp_path / name / "pruning_plan.json", "--layer", "2", monkeypatch=monkeypatch, capsys=capsys)


def test_tables_of_the_embedded_model_fit_eighty_columns(monkeypatch, capsys):
    require_embedded_model()
    assert_fits("smollm2-135m", monkeypatch=monkeypatch, capsys=capsys)


def test_a_pruned_folder_shows_what_was_pruned(tmp_path, monkeypatch, capsys):
    plan = pruned_folder("llama_grouped", tmp_path)
    output = inspect(tmp_path, columns=80, monkeypatch=monkeypatch, capsys=capsys)
    before = sum(p.numel() for p in build("llama_grouped").parameters())
    after = before - plan.removed_parameters
    row = next(line.split() for line in output.splitlines() if line.startswith("parameters"))
    assert row == ["parameters", f"{before:,}", f"{after:,}", f"({after / before:.1%})"]
    assert "PruningPlan of llama_grouped: removes" in output
    rows = [line.split()[1:] for line in output.splitlines() if line.startswith("model.layers.*.mlp.neurons")]
    assert [row[:4] for row in rows] == [["0", "24", "of", "48"], ["2", "24", "of", "48"]]
    assert "Units that can still be pruned" in output and "model.layers.0.mlp.neurons" in output
    document = json.loads(inspect(tmp_path, "--json", columns=80, monkeypatch=monkeypatch, capsys=capsys))
    assert document["parameters"] == after
    assert document["pruned"]["removed_parameters"] == before - after
    neurons = document["pruned"]["units"]["model.layers.2.mlp.neurons"]
    assert neurons["kept"] == 24 and neurons["score_removed"] == removed_share(
        [plan.units["model.layers.2.mlp.neurons"]]
    )


def test_layers_that_keep_the_same_are_one_row(home, monkeypatch, capsys):
    output = inspect(home / "uniform" / "pruning_plan.json", columns=80, monkeypatch=monkeypatch, capsys=capsys)
    rows = [line for line in output.splitlines() if line.startswith("model.layers.*.mlp.neurons")]
    assert len(rows) == 1 and "0-2" in rows[0] and "32 of 64 (50.0%)" in rows[0]


def test_a_plan_states_shares_and_no_predicted_loss(tmp_path, monkeypatch, capsys):
    model = build("llama_grouped")
    graph = lp.trace(model)
    values = torch.tensor([1.0] * 24 + [1.0001] * 24, dtype=torch.float64)
    scores = lp.Scores({unit.name: values for unit in graph.of_kind("neurons")}, {"criterion": "taylor"})
    lp.select(graph, scores, 0.5, ["neurons"]).save(tmp_path / "plan.json")
    output = inspect(tmp_path / "plan.json", columns=80, monkeypatch=monkeypatch, capsys=capsys)
    assert "loss" not in output
    assert re.search(r"neurons +3 +72 of 144 +50.0% +50.0%", output)
    assert "0.01%" in output  # margin: 1.0001 against 1


METRICS = {
    "parameters_before": 200,
    "parameters_after": 150,
    "before": {"perplexity": {"general": {"perplexity": 20.0855, "tokens": 4096, "seq_len": 128}}},
    "after": {"perplexity": {"general": {"perplexity": 54.5982, "tokens": 4096, "seq_len": 128}}},
}


def test_measurements_beside_a_plan_are_shown(plan, monkeypatch, capsys):
    (plan.parent / "metrics.json").write_text(json.dumps(METRICS))
    output = inspect(plan, columns=80, monkeypatch=monkeypatch, capsys=capsys)
    assert re.search(r"perplexity, general \(4,096 tokens\) +20.09 +54.60", output)
    assert re.search(r"loss, nats per token +3.000 +4.000", output)
    assert re.search(r"parameters +200 +150 \(75.0%\)", output)


@pytest.mark.parametrize("content", ["[]", "{}", '{"parameters_before": 2}', '{"parameters_before": "many"}'])
def test_a_record_of_another_program_is_passed_over(content, plan, monkeypatch, capsys):
    (plan.parent / "metrics.json").write_text(content)
    assert "measured" not in inspect(plan, columns=80, monkeypatch=monkeypatch, capsys=capsys)


def test_removed_layers_are_named(tmp_path, monkeypatch, capsys):
    model = build("llama_grouped", num_hidden_layers=6)
    graph = lp.trace(model)
    scores = lp.Scores({"model.layers.layers": torch.tensor([9.0, 8, 1, 2, 3, 9]).double()})
    lp.save(lp.apply(model, plan := lp.select(graph, scores, 0.5, ["layers"])), None, tmp_path, plan=plan)
    output = inspect(tmp_path, columns=80, monkeypatch=monkeypatch, capsys=capsys)
    assert "removed from model.layers: 2-4" in output and "3 of 6" in output


def test_weights_are_not_asked_for_where_inputs_are_missing(tmp_path, capsys):
    """A decision transformer reads states, which no signature or config tells, with or without its weights."""
    config = DecisionTransformerConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=8)
    config.architectures = ["DecisionTransformerModel"]
    config.save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "needs 'states', which cannot be guessed: give lp.trace(model, inputs=…)" in error
    assert "--verify" not in error
