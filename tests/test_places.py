"""Output folders: checkpoints are kept by default, and no run replaces another."""

import json
from pathlib import Path

import pytest

import llm_pruner as lp
from llm_pruner.cli import main, run_command
from llm_pruner.commands import SCRIPTS
from llm_pruner.evaluation.arguments import EvaluateArguments, PerplexityArguments
from llm_pruner.evaluation.run import run_perplexity
from llm_pruner.recipes.recipe import read as read_recipe
from llm_pruner.vocabulary.arguments import VocabArguments
from llm_pruner.vocabulary.run import resolve as resolve_vocabulary

METHOD = ["--pruner_type", "l2", "--compensate", "none", "--eval_datasets", "", "--device", "cpu"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def prune(home, *extra, script=None):
    argv = ["--model", str(home / "base"), *METHOD, *map(str, extra)]
    return run_command(SCRIPTS[script], argv, script) if script else main(["prune", *argv])


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def test_prune_saves_unless_told_otherwise(home, here, capsys):
    assert prune(home) == 0
    assert lp.load("prune_log/llama_prune")[0] is not None
    assert prune(home, "--no_save", "--save_ckpt_log_name", "plan") == 0
    names = {file.name for file in (here / "prune_log" / "plan").iterdir()}
    assert "pruning_plan.json" in names and not names & {"model.safetensors", "config.json"}
    assert "no checkpoint will be kept" not in capsys.readouterr().err, "it was asked for"
    for flag in ("--save_model", "--standalone"):
        assert prune(home, "--no_save", flag) == 2
        assert f"error: {flag} and --no_save exclude each other" in capsys.readouterr().err


def test_hf_prune_says_first_that_nothing_is_kept(home, here, capsys):
    assert prune(home, script="hf_prune.py") == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "Writing" not in line]
    assert "no checkpoint will be kept: add --save_model" in lines[1] and "loaded" in lines[2]
    assert not list((here / "prune_log" / "llama_prune").glob("*.safetensors"))
    assert prune(home, "--output", "kept", script="hf_prune.py") == 0
    assert weights(here / "kept") and "no checkpoint" not in capsys.readouterr().err


def test_a_default_folder_is_not_replaced_by_another_run(home, here, capsys):
    assert prune(home) == 0
    first = weights(here / "prune_log" / "llama_prune")
    for _ in range(2):  # the second time it replaces its own
        assert prune(home, "--pruning_ratio", 0.25) == 0
        first_line = (here / "prune_log" / "llama_prune-2" / "prune.log").read_text().splitlines()[0]
        assert "writing to prune_log/llama_prune-2: prune_log/llama_prune holds another run" in first_line
    assert prune(home, "--pruning_ratio", 0.3) == 0
    assert {folder.name for folder in (here / "prune_log").iterdir()} == {
        *("llama_prune", "llama_prune-2", "llama_prune-3")
    }
    assert weights(here / "prune_log" / "llama_prune") == first
    assert prune(home) == 0 and weights(here / "prune_log" / "llama_prune") == first


def test_a_named_folder_with_another_run_is_refused(home, home_text, here, capsys):
    assert prune(home, "--output", "out") == 0
    assert prune(home, "--output", "out") == 0, "the same command may replace its run"
    before = {file.name: file.read_bytes() for file in (here / "out").iterdir()}
    capsys.readouterr()
    plan, base, text = here / "out" / "pruning_plan.json", home / "base", str(home_text)
    for argv in (
        ["prune", base, "out", *METHOD, "--pruning_ratio", 0.25],
        ["recover", home / "pruned", "out", "--data_path", home / "data.jsonl", "--cutoff_len", 64],
        ["vocab", base, "out", "--keep", 0.8, "--corpus", text, "--eval_dataset", text],
        ["apply", plan, base, "out"],
        ["to-uniform", home / "pruned", "out", "--allow_padding"],
    ):
        assert main(list(map(str, argv))) == 2
        error = capsys.readouterr().err
        assert "out holds a " in error and "remove it, or give another --output" in error, error
    with pytest.raises(lp.PrunerError, match="out holds a run with other arguments"):
        lp.prune(str(base), pruner_type="l2", output="out")
    assert {file.name: file.read_bytes() for file in (here / "out").iterdir()} == before


@pytest.mark.parametrize("command", ["apply", "to-uniform"])
def test_commands_on_files_replace_their_own_output_only(command, home, here, capsys):
    plan, pruned = home / "pruned" / "pruning_plan.json", home / "pruned"
    argv = (
        ["apply", plan, home / "base", "out"]
        if command == "apply"
        else ["to-uniform", pruned, "out", "--allow_padding"]
    )
    assert main(list(map(str, argv))) == 0 and main(list(map(str, argv))) == 0
    other = ["--standalone"] if command == "apply" else ["--trust_remote_code"]
    assert main([*map(str, argv), *other]) == 2
    assert "out holds a run with other arguments" in capsys.readouterr().err


def test_evaluations_and_reports_are_not_replaced(home, home_text, here, capsys):
    measure = ["evaluate", str(home / "base"), "--datasets", str(home_text), "--seq_len", "16", "--tokens", "0"]
    measure += ["--output", "measured", "--max_windows"]
    assert main([*measure, "2"]) == 0 and main([*measure, "2"]) == 0
    table = (here / "measured" / "table.md").read_bytes()
    assert main([*measure, "3"]) == 2
    assert "measured holds a run with other arguments" in capsys.readouterr().err
    assert (here / "measured" / "table.md").read_bytes() == table
    assert main([*measure[:-3], "--output", "more", "--max_windows", "3"]) == 0
    assert main(["report", "measured"]) == 0 and main(["report", "measured"]) == 0
    page = (here / "report.html").read_bytes()
    assert main(["report", "measured", "more"]) == 0 and (here / "report-2.html").is_file()
    assert main(["report", "more", "--output", str(here / "report.html")]) == 2
    assert "report.html holds a report of other runs" in capsys.readouterr().err
    assert (here / "report.html").read_bytes() == page


def test_a_record_of_perplexity_is_not_replaced(home, home_text, here):
    measure = {"model": str(home / "base"), "dataset": str(home_text), "seq_len": 16, "output": "one.json"}
    for _ in range(2):
        run_perplexity(PerplexityArguments(**measure, max_windows=2))
    record = (here / "one.json").read_bytes()
    with pytest.raises(lp.PrunerError, match=r"one\.json holds something else, which this run would replace"):
        run_perplexity(PerplexityArguments(**measure, max_windows=3))
    assert (here / "one.json").read_bytes() == record


def test_a_tilde_that_no_shell_expands_is_the_home_folder(home, home_text, here, monkeypatch):
    """A shell leaves it in --output=~/table and in a recipe's text."""
    monkeypatch.setenv("HOME", str(here / "user"))
    flags = ["--datasets", str(home_text), "--max_windows", "2", "--seq_len", "16", "--tokens", "0"]
    assert main(["evaluate", str(home / "base"), *flags, "--output=~/table"]) == 0
    assert (here / "user" / "table" / "evaluation.json").is_file() and not (here / "~").exists()
    run_perplexity(PerplexityArguments(model=str(home / "base"), dataset=str(home_text), seq_len=16, output="~/p.json"))
    assert (here / "user" / "p.json").is_file() and not (here / "~").exists()
    counted = VocabArguments(keep_tokens="~/kept.txt", save_counts="~/counts.json")
    settings = resolve_vocabulary(counted)
    assert (settings.listed, settings.counts_file) == (here / "user" / "kept.txt", here / "user" / "counts.json")


def test_every_flag_and_a_recipe_know_the_home_folder(here, monkeypatch):
    monkeypatch.setenv("HOME", str(here))
    flags = EvaluateArguments(model=["~/one", "gpt2"], include_path="~/tasks", output=Path("~/table"))
    assert flags.model == [f"{here}/one", "gpt2"]
    assert (flags.include_path, flags.output) == (f"{here}/tasks", f"{here}/table")
    (here / "recipe.yaml").write_text("model: ~/one\noutput: ~/runs\nstages: [prune: {target_params: 0.8}]\n")
    assert read_recipe("~/recipe.yaml").output == f"{here}/runs"


def test_a_default_recovery_is_not_replaced(home, here, capsys):
    train = ["recover", str(home / "pruned"), "--data_path", str(home / "data.jsonl"), "--device", "cpu"]
    train += ["--max_steps", "1", "--batch_size", "2", "--micro_batch_size", "2", "--cutoff_len", "64"]
    assert main(train) == 0
    adapter = (here / "lora-alpaca" / "adapter_model.safetensors").read_bytes()
    assert main([*train, "--learning_rate", "0.01"]) == 0
    assert (here / "lora-alpaca-2" / "adapter_model.safetensors").is_file()
    assert (here / "lora-alpaca" / "adapter_model.safetensors").read_bytes() == adapter
    record = json.loads((here / "lora-alpaca-2" / "recovery.json").read_text())
    assert record["arguments"]["learning_rate"] == 0.01
