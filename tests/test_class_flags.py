"""``--task`` and ``--towers`` mean the same in every command, and in the stages of recipes."""

import json
import shutil

import pytest
import torch
import transformers
from helpers.media import model_of, save_llava
from helpers.recipes import printed_table
from transformers import AutoConfig

import llm_pruner as lp
from llm_pruner.cli import main
from llm_pruner.files import read_json
from llm_pruner.media import media_inputs
from llm_pruner.recipes.results import lower_is_better

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
PRUNE = "--pruning_ratio 0.25 --kinds neurons --pruner_type l2 --compensate none --eval_datasets="
PARAMETERS = -4  # column of a dry run


@pytest.fixture
def classifier(tokenizer, tmp_path):
    """A folder with a classifier of texts and its tokenizer."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("bert", **SIZES, vocab_size=len(tokenizer), max_position_embeddings=144)
    lp.save(transformers.BertForSequenceClassification(config).eval(), tokenizer, tmp_path / "classifier")
    return tmp_path / "classifier"


def same_weights(*folders):
    """The class of all checkpoints, which must be one, after checking that they hold the same."""
    models = [lp.load(str(folder))[0] for folder in folders]
    states = [model.state_dict() for model in models]
    for model, state in zip(models[1:], states[1:], strict=True):
        assert type(model) is type(models[0]) and state.keys() == states[0].keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in states[0].items())
    return type(models[0]).__name__


@pytest.mark.parametrize("towers", ("vision", "all"))
def test_plans_that_cut_other_towers_are_applied(llava, towers, tmp_path, capsys):
    """By command, in Python, and without a processor: the config tells what an image is."""
    prune = f"prune {llava} {tmp_path}/pruned --towers {towers} --num_examples 4 {PRUNE}"
    assert main(prune.split()) == 0
    plan = tmp_path / "pruned" / "pruning_plan.json"
    assert any("vision" in name for name in lp.PruningPlan.load(plan).units)
    assert main(f"apply {plan} {llava} {tmp_path}/applied".split()) == 0
    model, _ = lp.load(str(llava))
    lp.save(lp.apply(model, lp.PruningPlan.load(plan)), None, tmp_path / "python")
    for file in (llava / "processor_config.json", llava / "preprocessor_config.json"):
        file.unlink(missing_ok=True)
    assert main(f"apply {plan} {llava} {tmp_path}/guessed".split()) == 0
    same_weights(*(tmp_path / name for name in ("pruned", "applied", "python", "guessed")))


def test_a_plan_for_towers_that_nothing_can_be_shown_to_is_refused(llava, tmp_path, capsys):
    """Without a processor, and without a token in the config that marks an image: one line and no file."""
    assert main(f"prune {llava} {tmp_path}/pruned --towers vision --num_examples 4 {PRUNE}".split()) == 0
    for file in (llava / "processor_config.json", llava / "preprocessor_config.json"):
        file.unlink(missing_ok=True)
    config = json.loads((llava / "config.json").read_text())
    config.pop("image_token_id", None)
    config["image_token_index"] = 10**6
    (llava / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    assert main(f"apply {tmp_path}/pruned/pruning_plan.json {llava} {tmp_path}/refused".split()) == 2
    assert "has no processor" in capsys.readouterr().err and not (tmp_path / "refused").exists()


@pytest.mark.parametrize("towers, language, vision", (("language", 24, 32), ("vision", 32, 24), ("all", 24, 24)))
def test_the_projector_follows_hidden_channels(llava, towers, language, vision, tmp_path, capsys):
    """Its output those of the language, its input those of the vision tower; compared on images."""
    prune = f"prune {llava} {tmp_path}/pruned --towers {towers} --num_examples 4 --pruning_ratio 0.25 --kinds hidden"
    assert main([*prune.split(), "--compensate", "none", "--eval_datasets", ""]) == 0
    assert "equals the masked original" in "".join(capsys.readouterr())
    pruned, _ = lp.load(str(tmp_path / "pruned"))
    projector = pruned.model.multi_modal_projector
    assert (projector.linear_1.in_features, projector.linear_2.out_features) == (vision, language)
    assert pruned.config.vision_config.hidden_size == vision and pruned.config.text_config.hidden_size == language
    assert main(f"apply {tmp_path}/pruned/pruning_plan.json {llava} {tmp_path}/applied".split()) == 0
    assert same_weights(tmp_path / "pruned", tmp_path / "applied") == type(pruned).__name__
    before, _ = lp.load(str(llava))
    plan = lp.PruningPlan.load(tmp_path / "pruned" / "pruning_plan.json")
    images = media_inputs(before, "synthetic", samples=2, seed=5).tensors()
    assert lp.verify(before, lp.apply(before, plan), plan, images).equivalent
    with torch.no_grad():
        projector.linear_2.bias.add_(1)
    assert not lp.verify(before, pruned, plan, images).equivalent, "images are read"


def test_layers_and_neurons_of_one_tower(tokenizer, tmp_path):
    """After its layers went, the other towers stay as they are, and the plan says which tower it is for."""
    deep = save_llava(tokenizer, tmp_path / "deep", vision_layers=4)
    prune = f"prune {deep} {tmp_path}/pruned --towers vision --drop_layers 0 --num_examples 4 {PRUNE}"
    assert main(prune.split()) == 0
    plan = lp.PruningPlan.load(tmp_path / "pruned" / "pruning_plan.json")
    assert plan.settings["towers"] == "vision" and all("vision" in name for name in plan.units)


def test_towers_that_are_not_there_are_refused_before_loading(llava, classifier, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("llm_pruner.pruning.loading.load", None)
    for folder, message in (
        (llava, "has language and vision"),
        (classifier, "no towers"),
    ):
        assert main(f"prune {folder} {tmp_path}/out --towers audio --kinds neurons".split()) == 2
        assert message in capsys.readouterr().err


def test_plans_for_another_class_are_applied(classifier, tmp_path, capsys):
    """Offloaded, cut file by file, and by a plan of Python that does not say its task; with one number for the size."""
    prune = f"prune {classifier} {tmp_path}/pruned --task feature-extraction {PRUNE}"
    assert main(prune.split()) == 0
    metrics = read_json(tmp_path / "pruned" / "metrics.json")
    said = "".join(capsys.readouterr())
    assert f"{metrics['parameters_ratio']:.3f} times the original's, {metrics['parameters_before']:,}" in said
    assert f"evaluate {classifier} {tmp_path}/pruned --task feature-extraction" in said
    assert main([*prune.replace("pruned", "offloaded").split(), "--stream"]) == 0
    assert read_json(tmp_path / "offloaded" / "metrics.json")["parameters_before"] == metrics["parameters_before"]
    plan = tmp_path / "pruned" / "pruning_plan.json"
    assert main(f"apply {plan} {classifier} {tmp_path}/applied".split()) == 0
    silent = lp.PruningPlan.load(plan)
    silent.settings.pop("task")
    silent.save(tmp_path / "silent.json")
    apply = f"apply {tmp_path}/silent.json {classifier} {tmp_path}/asked"
    assert main(apply.split()) == 2, "the declared class has other names"
    assert main([*apply.split(), "--task", "feature-extraction"]) == 0
    names = ("pruned", "offloaded", "applied", "asked")
    assert same_weights(*(tmp_path / name for name in names)) == "BertModel"


def test_a_refit_is_repeated_in_the_class_of_the_plan(classifier, tmp_path):
    prune = f"prune {classifier} {tmp_path}/pruned --task feature-extraction --kinds neurons --pruner_type l2 "
    prune += "--pruning_ratio 0.25 --calib_dataset python-docs --num_examples 32 --calib_seq_len 16 --eval_datasets="
    assert main([*prune.split(), "--self_examples", "0", "--refit_tokens", "1000"]) == 0
    apply = f"apply {tmp_path}/pruned/pruning_plan.json {classifier} {tmp_path}/applied --refit"
    assert main(apply.split()) == 0
    assert same_weights(tmp_path / "pruned", tmp_path / "applied") == "BertModel"


def test_inspect_shows_the_class_and_towers_that_prune_prunes(classifier, llava, tmp_path, capsys):
    def inspect(*words):
        assert main(["inspect", *map(str, words), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    whole, inner = inspect(classifier), inspect(classifier, "--task", "feature-extraction")
    assert inner["parameters"] < whole["parameters"] and "macs" not in whole
    assert {unit["name"].partition(".")[0] for unit in whole["units"]} >= {"bert"}
    units = inspect(llava, "--towers", "vision")["units"]
    assert units and {unit["name"] for unit in units if "vision" not in unit["name"]} == {"model.hidden"}, "its width"
    lp.save(model_of("ViTForImageClassification"), None, tmp_path / "vit")
    assert inspect(tmp_path / "vit")["macs"] > 10_000
    assert main(["inspect", str(tmp_path / "vit"), "--towers", "vision"]) == 2
    assert "has no towers beside a language model" in capsys.readouterr().err


def test_the_dry_run_of_a_recipe_heeds_both(classifier, llava, tmp_path, capsys):
    """The sizes are those that the commands leave."""
    flags = "pruning_ratio: 0.25, kinds: neurons, pruner_type: l2, compensate: none"
    for model, more, argv in (
        (llava, "towers: vision, num_examples: 4", "--towers vision --num_examples 4"),
        (classifier, "task: feature-extraction", "--task feature-extraction"),
    ):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(f"model: {model}\noutput: {tmp_path}/out\nstages:\n  - prune: {{{flags}, {more}}}\n")
        assert main(["run", str(recipe), "--dry_run"]) == 0
        predicted = printed_table(capsys.readouterr().out)["prune"]
        assert main(f"prune {model} {tmp_path}/pruned {argv} {PRUNE}".split()) == 0
        metrics = read_json(tmp_path / "pruned" / "metrics.json")
        assert predicted[PARAMETERS] == f"{metrics['parameters_after']:,}"
        shutil.rmtree(tmp_path / "pruned")


def test_recipes_compare_the_outputs_of_classifiers(classifier, home_text, tmp_path):
    """As ``evaluate`` does, with the model that the recipe starts from, in the class of the stage."""
    for task in ("", ", task: feature-extraction"):
        out, recipe = tmp_path / f"out{len(task)}", tmp_path / "recipe.yaml"
        recipe.write_text(
            f"model: {classifier}\noutput: {out}\nevaluate: {{datasets: {home_text}, max_windows: 8}}\nstages:\n"
            f"  - prune: {{pruning_ratio: 0.5, kinds: neurons, pruner_type: l2, compensate: none{task}}}\n"
        )
        assert main(["run", str(recipe)]) == 0
        first, second = read_json(out / "results.json")
        key = "cosine text" if task else "agreement text"
        assert key not in first and 0 < second[key] <= 1
        assert f"| {second[key]:.4g}".rstrip("0") in (out / "results.md").read_text()
    assert lower_is_better(key) is False and lower_is_better("speech wer") is True


def test_a_recipe_that_recovers_no_language_model_is_refused_first(tmp_path, capsys):
    lp.save(model_of("WhisperForConditionalGeneration"), None, tmp_path / "whisper")
    (tmp_path / "data.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {tmp_path}/whisper\noutput: {tmp_path}/out\nstages:\n"
        "  - prune: {pruning_ratio: 0.25, kinds: neurons, pruner_type: l2, compensate: none}\n"
        f"  - recover: {{data_path: {tmp_path}/data.jsonl}}\n"
    )
    assert main(["run", str(recipe)]) == 2
    assert "recover needs a language model, and" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("01-*"))
