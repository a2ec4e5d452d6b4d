"""``llm-pruner inspect``: what it says of a model and of a plan."""

import json
import re

import pytest
import torch
from helpers.models import build

import llm_pruner as lp
from llm_pruner.cli import main


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
    assert int(re.search(r"(\d+) units:", output)[1]) == passed + untested
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
