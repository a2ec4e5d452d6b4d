"""Recipes are read from YAML; a mistake is refused with its file and line before anything runs."""

from dataclasses import fields

import pytest
from helpers.recipes import ADAPTER, FOUR_STAGES, PRUNE, write_recipe

import llm_pruner as lp
from llm_pruner.cli import main
from llm_pruner.commands import COMMANDS
from llm_pruner.recipes.recipe import read
from llm_pruner.recipes.schema import arguments_model
from llm_pruner.recipes.source import LIBRARY
from llm_pruner.recipes.stages import STAGES, chaining, is_chained
from llm_pruner.recipes.steps import steps_of
from llm_pruner.recipes.sweep import points_of

TEXT = "datasets: {home}/text.txt, seq_len: 16, max_windows: 2, tokens: 0"


@pytest.fixture
def recipe(home, home_text, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(FOUR_STAGES.format(home=home, out=tmp_path / "out"))
    return path


def refusal(recipe, capsys):
    """Return the one-line error of a recipe that must not run."""
    assert main(["run", str(recipe)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "Traceback" not in error
    assert not (recipe.parent / "out").exists()
    return error


def test_every_command_is_a_stage_with_all_its_flags():
    for command in STAGES:
        accepted = arguments_model(command).model_fields
        decided = {chaining(command).reads, *chaining(command).writes, "quiet"}  # a flag of the whole recipe
        assert {f.name for f in fields(COMMANDS[command].arguments_class)} - decided <= set(accepted), command


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("pruner_type: l2", "pruner_typ: l2", ":16: unknown key 'pruner_typ'; did you mean 'pruner_type'"),
        ("  - vocab:", "  - vocabs:", ":32: unknown stage 'vocabs'; did you mean 'vocab'"),
        ("  - vocab:", "  - recover: {}\n    vocab:", "a stage is one command with its arguments, not 2"),
        ("num_examples: 8", "num_examples: many", ":10: num_examples 'many' is not valid: input should be a valid int"),
        ("num_examples: 8", "num_examples: true", ":10: num_examples True is not valid"),
        ("lora_r: 2", "lora_r: null", ":29: lora_r None is not valid"),
        ("pruner_type: l2", "taylor: secnd", ":16: taylor 'secnd' is not valid: input should be 'vectorize'"),
        ("pruner_type: l2", "pruner_type: best", ":13: criterion 'best' is not valid: choose from"),
        ("pruner_type: l2", "pruner_type: no_such:thing", ":13: criterion 'no_such:thing': there is no module no_such"),
        ("model:", "modle:", ":2: unknown key 'modle'; did you mean 'model'"),
        ("model:", "# model:", "'model' is missing"),
        ("stages:", "stages: {", ".yaml:"),
        ("stages:", "executor: {jobs: 0}\nstages:", ":5: jobs 0 is not valid"),
        ("keep: 400", "keep: 400\n      keep: 5", ":35: the key 'keep' is given twice"),
        ("target_params: 0.9", "target_params: 0.9\n      target_macs: 0.5", ":15: --target_params and --target_macs"),
        ("device: cpu", "prune_model: x", ":31: unknown key 'prune_model': the recipe sets it"),
        ("name: depth", "base_model: x", ":7: unknown key 'base_model': the recipe sets it"),
        ("name: width", "name: depth", ":13: two stages are called 'depth'"),
        ("name: width", "name: ../../up", ":14: name '../../up' is not valid"),
        ("seq_len: 32", "seq_len: 32, dtype: int3", ":4: dtype 'int3' is not valid"),
        ("seq_len: 32", "seq_len: 32, models: [x]", ":4: unknown key 'models'"),
        ("  - vocab:", "  - apply: {}\n  - vocab:", ":32: give a plan, a checkpoint"),
        ("learning_rate: 1e-3", "learning_rate: !!python/object:os.system x", "could not determine a constructor"),
    ],
)
def test_mistakes_are_named_with_their_line(recipe, old, new, message, capsys):
    assert old in recipe.read_text()
    recipe.write_text(recipe.read_text().replace(old, new, 1))
    assert message in refusal(recipe, capsys)


def test_files_that_are_not_recipes_are_refused(tmp_path, capsys):
    for content in ("", "just words", "- 1\n- 2", "a: [", "\x00", "a: &a [*a]\n", "? [1]\n: 2\n", "1: 2"):
        path = tmp_path / "recipe.yaml"
        path.write_text(content)
        refusal(path, capsys)
    assert main(["run", str(tmp_path / "none.yaml")]) == 2
    assert main(["run"]) == 2


def test_numbers_may_be_written_as_people_do(recipe):
    text = recipe.read_text().replace("learning_rate: 1e-3", "learning_rate: 1e-3\n      weight_decay: 0")
    recipe.write_text(text.replace("max_steps: 4", "max_steps: 4e0"))
    _, width, recover, vocab = [step.arguments() for step in steps_of(read(recipe))]
    assert recover.max_steps == 4 and isinstance(recover.max_steps, int)
    assert recover.learning_rate == 1e-3 and recover.weight_decay == 0.0 and width.target_params == "0.9"
    assert vocab.keep == "400" and len(vocab.corpus) == 1


@pytest.mark.parametrize(
    ("tail", "message"),
    [
        ("sweep: {grid: {prune.seed: [1, 2, 1]}}", ":3: run 1: seed 1 and run 3 have the same values"),
        ("sweep: {grid: {prune.seed: [1, 2]}}\nseeds: [3]", ":3: run 1: seed 1, seed 3 and run 2 have the same values"),
        ("sweep:\n  zip: {prune.seed: [1, 1], prune.floor: [2, 2]}", ":3: run 1: seed 1, floor 2 and run 2 have"),
        ("seeds: [7, 7]", ":3: seeds [7, 7] is not valid: give every seed once"),
    ],
)
def test_runs_of_a_sweep_differ(home, tmp_path, tail, message, capsys):
    assert message in refusal(write_recipe(tmp_path, home, PRUNE, tail + "\n"), capsys)


@pytest.mark.parametrize("spelling", ["model", "models"])
def test_models_to_compare_may_be_given_in_every_spelling(home, home_text, tmp_path, spelling):
    stage = f"  - evaluate: {{{spelling}: [{home}/base], {TEXT.format(home=home)}}}\n"
    recipe = read(write_recipe(tmp_path, home, PRUNE + stage))
    pruned = steps_of(recipe)[0].folder
    assert steps_of(recipe)[1].arguments().model == [f"{home}/base", str(pruned)]
    grid = f"sweep: {{grid: {{evaluate.{spelling}: [a, [b, c]]}}}}\n"
    points = points_of(read(write_recipe(tmp_path, home, PRUNE + stage, grid)))
    compared = [point.steps[1].arguments().model[:-1] for point in points]
    assert compared == [["a"], ["b", "c"]]


def test_two_spellings_of_one_flag_exclude_each_other(home, tmp_path, capsys):
    path = write_recipe(tmp_path, home, f"{PRUNE}  - evaluate: {{model: a, models: b}}\n")
    assert ":5: models and model are one flag: give one" in refusal(path, capsys)


def test_every_spelling_of_a_flag_that_the_recipe_sets_is_recognised():
    for command, spellings in {
        "prune": ("model", "base_model", "output"),
        "recover": ("model", "prune_model", "output", "output_dir"),
        "vocab": ("base_model", "output_dir"),
        "to-uniform": ("checkpoint", "out"),
    }.items():
        assert all(is_chained(command, spelling) for spelling in spellings), command
        assert not set(spellings) & set(arguments_model(command).model_fields)


def test_stages_of_one_command_need_names(recipe):
    recipe.write_text(recipe.read_text().replace("      name: width\n", "").replace("      name: depth\n", ""))
    with pytest.raises(lp.PrunerError, match="two stages are called 'prune'"):
        read(recipe)


@pytest.mark.parametrize(
    "stage",
    [
        "to-uniform: {}",
        "apply: {plan: plan.json}",
        "recover: {name: again, data_path: x}",
        "prune: {name: again}",
    ],
)
def test_a_stage_that_cannot_read_an_adapter_is_refused_before_anything_runs(home, tmp_path, stage, capsys):
    stages = f"{PRUNE}{ADAPTER.format(home=home)}  - evaluate: {{}}\n  - {stage}\n"
    error = refusal(write_recipe(tmp_path, home, stages), capsys)
    assert ":8: " in error and "cannot read the adapter of recover: give it merge: true" in error


@pytest.mark.parametrize("folder", ["", "recipes/"])
@pytest.mark.parametrize("suffix", ["", ".yaml"])
def test_a_recipe_of_the_library_goes_by_its_name_anywhere(folder, suffix, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("smollm2_demo", "paper/llama7b_20"):
        assert read(f"{folder}{name}{suffix}") == read(LIBRARY / f"{name}.yaml")


def test_a_file_of_the_user_comes_before_the_library(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "recipes" / "smollm2_demo.yaml"
    path.parent.mkdir()
    path.write_bytes(write_recipe(tmp_path, home, PRUNE).read_bytes())
    assert read("recipes/smollm2_demo.yaml").model == f"{home}/base"
    (tmp_path / "smollm2_demo").mkdir()  # a folder, such as one that a run wrote, is no recipe
    assert read("smollm2_demo").model == "smollm2-135m"


@pytest.mark.parametrize("name", ["smollm2", "../library/smollm2_demo", "paper", "recipes/none.yaml", "/smollm2_demo"])
def test_an_unknown_recipe_lists_the_library(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["run", name]) == 2
    error = capsys.readouterr().err
    assert f"there is no recipe file {name}" in error and "paper/llama7b_20" in error and "smollm2_demo" in error


def test_all_recipes_of_the_library_can_be_read():
    for path in LIBRARY.rglob("*.yaml"):
        assert points_of(read(path))
