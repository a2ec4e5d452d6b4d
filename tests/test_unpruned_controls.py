"""Recovery of models that were not pruned, as controls."""

import json

import pytest
from helpers.recovery import SHORT_RUN, arguments, read_record

import llm_pruner as lp
from llm_pruner.cli import main
from llm_pruner.recovery.run import recover


@pytest.mark.parametrize("method", ["lora", "full"])
def test_an_unpruned_model_is_trained(home, tmp_path, method, capsys):
    flags = {"prune_model": str(home / "base"), "method": method, "merge": method == "lora"}
    out = recover(arguments(home, tmp_path / "out", **flags))
    assert "base is not pruned: training it as it is" in (out / "recovery.log").read_text()
    result = out / "merged" if method == "lora" else out
    original, trained = (lp.load(str(folder))[0] for folder in (home / "base", result))
    assert type(trained) is type(original) and trained.num_parameters() == original.num_parameters()
    first, last = read_record(out)["losses"]["validation"]
    assert last < first
    command = ["prune", str(result), str(tmp_path / "pruned"), "--pruner_type", "l2", "--compensate", "none", "--quiet"]
    assert main([*command, "--eval_datasets", ""]) == 0
    assert lp.load(str(tmp_path / "pruned"))[0].num_parameters() < original.num_parameters()


def test_an_adapter_names_its_unpruned_model(home, tmp_path):
    out = recover(arguments(home, tmp_path / "out", prune_model=str(home / "base"), max_steps=1, batch_size=2))
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str((home / "base").resolve())
    assert lp.load(str(out))[0].num_parameters() == lp.load(str(home / "base"))[0].num_parameters()


def test_a_recipe_trains_a_control(home, tmp_path):
    recipe = tmp_path / "control.yaml"
    training = {"data_path": str(home / "data.jsonl"), **SHORT_RUN, "max_steps": 1, "eval_steps": 1, "save_steps": 1}
    settings = {"datasets": "general", "max_windows": 2, "tokens": 0}
    content = {"model": str(home / "base"), "output": str(tmp_path / "run"), "evaluate": settings}
    recipe.write_text(json.dumps(content | {"stages": [{"recover": training}]}))
    assert main(["run", str(recipe)]) == 0
