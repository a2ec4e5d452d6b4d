"""Every command warns if a model is measured on a text that it was calibrated or trained on."""

import json

import pytest
from transformers import PreTrainedTokenizerBase

import llm_pruner as lp
from llm_pruner.cli import main
from llm_pruner.evaluation.shared_texts import warn_of_shared_texts

WARNING = "flatters {}, calibrated or trained on the same source"


def test_a_text_in_common_is_told(caplog):
    with caplog.at_level("INFO", "llm_pruner"):
        warn_of_shared_texts({"c4"}, ["wikitext2", "c4"])
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "perplexity on c4 flatters the pruned model" in caplog.text


@pytest.fixture
def calibrated(home, tokenizer: PreTrainedTokenizerBase, tmp_path):
    """A model that was cut by text of ``general``."""
    model, _ = lp.load(str(home / "base"))
    graph = lp.trace(model)
    plan = lp.select(graph, lp.score(model, graph, criterion="l2"), 0.5, kinds=("neurons",))
    plan.settings["calibration"] = "general"
    lp.save(lp.apply(model, plan), tokenizer, tmp_path / "cut", plan=plan)
    return tmp_path / "cut"


def test_evaluate_warns_of_the_models_that_saw_the_text(calibrated, home, capsys):
    flags = ["--tokens", "0", "--max_windows", "2", "--device", "cpu"]
    assert main(["evaluate", str(home / "base"), str(calibrated), "--datasets", "general,python-docs", *flags]) == 0
    error = capsys.readouterr().err
    assert f"perplexity on general {WARNING.format(calibrated)}" in error
    assert error.count("flatters") == 1


@pytest.mark.parametrize("method", ["lora", "full"])
def test_recover_warns_of_shared_texts_and_records_its_own(method, calibrated, home, tmp_path, capsys):
    out = tmp_path / "recovered"
    argv = ["recover", str(calibrated), str(out), "--method", method, "--data_path", str(home / "data.jsonl")]
    argv += ["--max_steps", "1", "--batch_size", "4", "--cutoff_len", "64", "--val_set_size", "0", "--device", "cpu"]
    assert main([*argv, "--extra_val_dataset", "general,python-docs", "--max_windows", "2"]) == 0
    assert f"perplexity on general {WARNING.format(calibrated)}" in capsys.readouterr().err
    plan = json.loads(next(out.rglob("pruning_plan.json")).read_text())
    assert plan["settings"]["trained_on"] == [str(home / "data.jsonl")]
    flags = ["--tokens", "0", "--max_windows", "2", "--device", "cpu", "--seq_len", "64"]
    assert main(["evaluate", str(out), "--datasets", str(home / "data.jsonl"), *flags]) == 0
    assert f"{home / 'data.jsonl'} {WARNING.format(out)}" in capsys.readouterr().err
