"""Recipes run stage by stage; finished stages are skipped, and a killed run continues."""

import json
import subprocess
import sys

import pytest
from helpers.recipes import ADAPTER, FOUR_STAGES, PRUNE, results, write_recipe

import llm_pruner as lp
from llm_pruner.cli import main
from llm_pruner.files import folder_lock
from llm_pruner.recipes import steps
from llm_pruner.recipes.arguments import RunArguments
from llm_pruner.recipes.recipe import read
from llm_pruner.recipes.run import run_recipe
from llm_pruner.recipes.source import LIBRARY
from llm_pruner.recipes.steps import remove_weights, steps_of
from llm_pruner.recipes.sweep import points_of

MEASURE = "evaluate: {{datasets: {home}/text.txt, seq_len: 16, max_windows: 2}}\n"


@pytest.fixture
def recipe(home, home_text, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(FOUR_STAGES.format(home=home, out=tmp_path / "out"))
    return path


@pytest.fixture
def pruning(home, home_text, tmp_path):
    """A recipe of one stage, measured."""
    return write_recipe(tmp_path, home, PRUNE, MEASURE.format(home=home))


def run(path, **flags):
    return run_recipe(RunArguments(recipe=str(path), **flags))


def write_times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}


def test_stages_follow_each_other_and_are_cached(recipe, tmp_path, capsys):
    with pytest.raises(lp.PrunerError, match="nothing was run yet"):
        run(recipe, status=True)
    out = run(recipe)
    rows = results(out)
    assert [row["stage"] for row in rows] == ["original", "depth", "width", "recover", "vocab"]
    sizes = [row["parameters"] for row in rows]
    assert sizes[0] > sizes[1] > sizes[2] == sizes[3] > sizes[4]
    assert sizes[2] <= 0.9 * sizes[1]
    assert all(row["perplexity text"] > 1 and 1 < row["per byte text"] < row["perplexity text"] for row in rows)
    assert (out / "results.md").read_text().count("\n") == 7 and "vocab" in (out / "results.csv").read_text()
    folders = {path.name.rpartition("-")[0]: path for path in out.iterdir() if path.name[:2].isdigit()}
    model, tokenizer = lp.load(str(folders["04-vocab"]))
    assert model.config.num_hidden_layers == 2 and len(tokenizer) == 400
    assert model.num_parameters() == sizes[4]
    assert main(["report", str(out), "--output", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert all(folder.name in page for name, folder in folders.items() if name != "04-vocab")
    capsys.readouterr()
    run(recipe, status=True)
    shown = capsys.readouterr().out
    assert shown.count("done") == 4 and "waiting" not in shown
    before = write_times(out)
    run(recipe)
    assert write_times(out) == before
    recipe.write_text(recipe.read_text().replace("keep: 400", "keep: 380"))
    run(recipe)
    after = write_times(out)
    assert before.items() <= after.items() and len(after) == len(before) + 1


@pytest.mark.slow
def test_an_adapter_is_measured_and_read_by_later_stages(home, home_text, tmp_path):
    compare = f"  - evaluate: {{datasets: {home_text}, seq_len: 16, max_windows: 2, tokens: 0, models: {home}/base}}\n"
    tokens = f"  - vocab: {{corpus: {home_text}, keep: 400, eval_dataset: {home_text}, max_windows: 2}}\n"
    stages = PRUNE + ADAPTER.format(home=home) + compare + tokens
    recipe = write_recipe(tmp_path, home, stages, MEASURE.format(home=home))
    out = run(recipe)
    sizes = {row["stage"]: row.get("parameters") for row in results(out)}
    assert sizes["original"] > sizes["prune"] == sizes["recover"] > sizes["vocab"] and sizes["evaluate"] is None
    (adapter,) = out.glob("02-recover-*")
    assert (adapter / "adapter_config.json").is_file() and not (adapter / "merged").exists()
    (evaluation,) = out.glob("03-evaluate-*/evaluation.json")
    first, second = json.loads(evaluation.read_text())["models"]
    assert first["model"] == f"{home}/base" and second["model"] == str(adapter)
    prune, recover, *_ = steps_of(read(recipe))
    remove_weights(prune)  # an adapter without its base is of no use
    recipe.write_text(recipe.read_text().replace("keep: 400", "keep: 380"))
    run(recipe)
    assert any(prune.folder.glob("*.safetensors")) and any(recover.folder.glob("adapter_model.safetensors"))


@pytest.mark.slow
def test_removed_weights_are_made_again_for_a_new_measurement(pruning):
    out = run(pruning)
    (step,) = steps_of(read(pruning))
    remove_weights(step)
    pruning.write_text(pruning.read_text().replace("max_windows: 2", "max_windows: 3"))
    run(pruning)
    assert any(step.folder.glob("*.safetensors")) and len(list((out / "evaluations").iterdir())) == 4


def test_other_versions_run_a_stage_and_a_measurement_anew(home, tmp_path, monkeypatch):
    """Commands are replaced by their shortest possible work: keys and logs are what counts."""

    def write_weights(step, launch):
        step.folder.mkdir(parents=True)
        (step.folder / "model.safetensors").touch()

    monkeypatch.setattr(steps, "_run_command", write_weights)
    monkeypatch.setattr(steps, "measure", lambda arguments, **_: [])
    monkeypatch.setattr(steps, "_row_of", lambda evaluations: {"parameters": 1})
    recipe, before = write_recipe(tmp_path, home, PRUNE, "evaluate: {}\n"), steps.versions()
    for _ in range(2):
        out = run(recipe)
        assert len(list(out.glob("01-prune-*"))) == 1 and len(list((out / "evaluations").iterdir())) == 2
    for i, package in enumerate(("transformers", "llm_pruner"), 2):
        monkeypatch.setattr(steps, "versions", lambda package=package: before | {package: "99"})
        run(recipe)
        assert len(list(out.glob("01-prune-*"))) == i and len(list((out / "evaluations").iterdir())) == 2 * i
        log = (out / "run.log").read_text()
        assert f"was made with other versions ({package} {before[package]} -> 99): run anew" in log


def test_only_one_process_runs_recipes_in_a_folder(recipe, tmp_path):
    with folder_lock(tmp_path / "out", "recipe"), pytest.raises(lp.PrunerError, match="another process is running"):
        run(recipe)


def test_a_recipe_prunes_kinds_by_a_criterion_of_the_user(home, home_text, tmp_path, monkeypatch):
    (tmp_path / "own_criterion.py").write_text("from llm_pruner.importance.criteria import CRITERIA\n\n\n")
    with (tmp_path / "own_criterion.py").open("a") as file:
        file.write("def like_l2(request):\n    return CRITERIA['l2'].function(request)\n")
    monkeypatch.syspath_prepend(tmp_path)
    kept = {}
    for criterion in ("l2", "own_criterion:like_l2"):
        settings = (
            f"kinds: [neurons], preset: paper, pruner_type: '{criterion}', hardware_align: false, compensate: none"
        )
        out = run(write_recipe(tmp_path, home, f"  - prune: {{{settings}, num_examples: 2, calib_seq_len: 16}}\n"))
        (step,) = steps_of(read(tmp_path / "recipe.yaml"))
        units = lp.PruningPlan.load(step.folder / "pruning_plan.json").units
        kept[criterion] = {name: choice.kept.tolist() for name, choice in units.items()}
        assert {choice.kind for choice in units.values()} == {"neurons"} and out is not None
    assert kept["l2"] == kept["own_criterion:like_l2"]


@pytest.mark.slow
def test_a_killed_run_continues_to_the_same_results(recipe, tmp_path):
    """SIGKILL in the middle of a stage and of a training run, each seen in the log."""
    whole = run(recipe, output=str(tmp_path / "whole"))
    command = [sys.executable, "-u", "-m", "llm_pruner", "run", str(recipe)]
    for event in ("width: prune", "recover: recover"):
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            lines = iter(process.stderr.readline, "")
            assert any(event in line for line in lines)
            process.kill()
    assert results(run(recipe)) == results(whole)


def test_published_numbers_stand_beside_measured_ones(tmp_path):
    counts = {path.stem: len(points_of(read(path))) for path in (LIBRARY / "paper").glob("*.yaml")}
    assert counts["smollm2"] == 102 and counts["llama7b_20"] == counts["vicuna7b_50_tuned"] == 6
    published = json.loads((LIBRARY / "paper" / "published.json").read_text())
    for name, table in published.items():
        if isinstance(table, list):
            points = points_of(read(LIBRARY / "paper" / f"{name}.yaml"))
            for row in table:
                varied = {key: value for key, value in row["point"].items() if key != "point"}  # 0: an original
                assert any(varied.items() <= point.values.items() for point in points), (name, varied)
    out = tmp_path / "llama7b_20"
    out.mkdir()
    rows = [{"point": 0, "perplexity wikitext2": 12.62, "piqa acc": 0.1, "piqa acc_norm": 0.78}]
    rows.append({"point": 5, "prune.taylor": "param_second", "perplexity wikitext2": 20.5})
    (out / "results.json").write_text(json.dumps(rows))
    script = [sys.executable, "-m", "llm_pruner.recipes.published"]
    printed = subprocess.run([*script, str(out)], capture_output=True, text=True, check=True).stdout
    assert "| unpruned | 12.62 / 12.62 | - / 22.14 | - / 73.18 | 78 / 78.35 |" in printed
    assert "| param_second | 20.5 / 19.77 |" in printed
    failed = subprocess.run([*script, str(tmp_path)], capture_output=True, text=True)
    assert failed.returncode == 1 and "it has llama7b_20" in failed.stderr
