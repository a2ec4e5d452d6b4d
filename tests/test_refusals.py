"""Bad input is refused before any work: one line, exit code 2, nothing written, no weight read."""

import json
import os
import shlex

import pytest
from helpers.recipes import write_recipe

from llm_pruner.checkpoint import load
from llm_pruner.cli import main, run_command
from llm_pruner.commands import SCRIPTS

PRUNE = "prune {home}/base --output out --calib_dataset {home}/text.txt --eval_datasets '' "
RECOVER = "recover {home}/pruned --data_path {home}/data.jsonl --cutoff_len 64 --output out "
EVALUATE = "evaluate {home}/base --datasets {home}/text.txt "
VOCAB = "vocab {home}/base --keep 400 --corpus {home}/text.txt --eval_dataset {home}/text.txt --output out "
APPLY = "apply {home}/pruned/pruning_plan.json {home}/base out "

# A command line, and words of its error.
REFUSED = [
    # sizes and fractions
    (PRUNE + "--target_params 1.5", "--target_params '1.5' is not valid: 1.5 is above 1; use a fraction"),
    (PRUNE + "--target_params 0", "--target_params '0' is not valid: use a fraction"),
    (PRUNE + "--target_params x", "--target_params 'x' is not valid: use a fraction"),
    (PRUNE + "--target_params 120%", "--target_params '120%' is not valid"),
    (PRUNE + "--target_macs 9X", "--target_macs '9X' is not valid"),
    (PRUNE + "--target_memory 3parsec", "--target_memory '3parsec' is not valid"),
    (PRUNE + "--target_latency 30", "--target_latency '30' is not valid"),
    (PRUNE + "--target_params 9T", "--target_params 9T is 9,000,000,000,000", "give less"),
    (PRUNE + "--target_macs 9T --budget_tokens 16", "--target_macs 9T", "give less"),
    (PRUNE + "--target_params 0.01", "stay; prune more kinds (--kinds heads,neurons) or remove layers"),
    (PRUNE + "--target_params 0.8 --pruning_ratio 0.2", "--target_params and --pruning_ratio exclude each other"),
    (PRUNE + "--pruning_ratio 150%", "--pruning_ratio 1.5 is out of range: give a share between 0 and 1 (0.2 or 20%)"),
    (PRUNE + "--shares layers=1", "--shares needs one of --target_params, --target_macs, --target_memory or"),
    (PRUNE + "--pruning_ratio much", "--pruning_ratio 'much' is not valid: give a share such as 0.8 or 80%"),
    (VOCAB + "--keep 0", "--keep '0' is not valid"),
    (VOCAB + "--keep 150%", "--keep '150%' is not valid"),
    (VOCAB + "--keep coverage=2", "--keep 'coverage=2' is not valid"),
    ("demo --output out --pruning_ratio 1.5", "--pruning_ratio 1.5 is out of range"),
    (PRUNE + "--temperature 0", "--temperature 0.0 is out of range: give a number above 0"),
    (PRUNE + "--temperature nan", "--temperature nan is out of range: give a number above 0"),
    (PRUNE + "--top_p 3", "--top_p 3.0 is out of range: give a number above 0, and at most 1"),
    (PRUNE + "--refit lora --compensate none", "--compensate and --refit exclude each other (each names the refit)"),
    (PRUNE + "--kinds --pruning_ratio 0.2", "--kinds: expected at least one argument"),
    # layers
    (PRUNE + "--layer_wise --layer 9", "--layer: cannot keep 9 layers, the model has 3 layers: give 1 to 2"),
    (PRUNE + "--drop_layers 7", "--drop_layers 7 is out of range: the model has layers 0 to 2"),
    (PRUNE + "--num_layers 7", "--num_layers: cannot keep 7 layers, the model has 3 layers: give 1 to 2"),
    (PRUNE + "--drop_attention 9", "--drop_attention 9: layer 9 is out of range: the model has layers 0 to 2"),
    (PRUNE + "--drop_mlp encoder.1", "--drop_mlp does not say which stack"),
    (PRUNE + "--block_mlp_layer_start 2 --block_mlp_layer_end 30", "--block_mlp_layer_end 30 is out of range"),
    (PRUNE + "--block_attention_layer_start 3 --block_attention_layer_end 3", "is out of range"),
    # shapes and kinds
    (PRUNE + "--hidden_size 33", "LlamaConfig refuses it: The hidden size (33) is not a multiple", "(4); with all"),
    (PRUNE + "--num_attention_heads 3", "the shape cannot be reached"),
    (PRUNE + "--num_hidden_layers 7", "cannot keep 7"),
    (PRUNE + "--kinds experts", "the model has no experts to prune"),
    # texts and data
    (PRUNE + "--calib_dataset nothing.txt", "--calib_dataset nothing.txt: no data set 'nothing.txt'"),
    (PRUNE + "--calib_dataset wikitxt2", "did you mean wikitext2?"),
    (PRUNE + "--calib_dataset {tmp}/empty.txt", "empty.txt holds no rows"),
    (PRUNE + "--calib_dataset {tmp}/other.jsonl", "has no column text or"),
    (PRUNE + "--calib_dataset c4", "--calib_dataset c4: the data set c4 could not be fetched from the hub"),
    (PRUNE + "--eval_datasets nothing.txt", "--eval_datasets nothing.txt: no data set"),
    (PRUNE + "--eval_datasets bookcorpus", "bookcorpus has no held-out part"),
    (EVALUATE + "--datasets {tmp}/empty.txt", "empty.txt holds no rows"),
    (EVALUATE + "--datasets {tmp}/null.jsonl", "null.jsonl: text of a row is 'None', not a text: leave it out"),
    (EVALUATE + "--datasets ptbb", "did you mean ptb?"),
    (RECOVER + "--data_path nothing.jsonl", "--data_path nothing.jsonl"),
    (RECOVER + "--data_path {tmp}/other.jsonl", "has the columns words"),
    (RECOVER + "--data_path {tmp}/empty.jsonl", "--data_path"),
    (RECOVER + "--data_path some/where", "--data_path some/where: cannot read the data set"),
    (RECOVER + "--extra_val_dataset ptbb", "--extra_val_dataset ptbb: no data set"),
    (VOCAB + "--corpus nothing.txt", "--corpus nothing.txt: no data set"),
    (
        "vocab {home}/base --keep 400 --corpus {tmp}/empty.txt --output out",
        "--corpus {tmp}/empty.txt: the corpus is empty",
    ),
    (VOCAB + "--eval_dataset {tmp}/empty.txt", "--eval_dataset {tmp}/empty.txt"),
    ("apply {tmp}/refitted.json {home}/base out --refit --calib_dataset nothing.txt", "--calib_dataset nothing.txt"),
    (RECOVER + "--cutoff_len 4096", "--cutoff_len 4096: windows of 4096 tokens are too long"),
    # files
    (PRUNE + "--target_config nothing.json", "cannot read nothing.json"),
    (RECOVER + "--prompt_template_name mine", "there is no prompt template 'mine'"),
    (RECOVER + "--resume_from_checkpoint nowhere", "--resume_from_checkpoint nowhere is not a checkpoint"),
    (VOCAB + "--keep_tokens nothing.txt", "--keep_tokens nothing.txt: cannot read"),
    (VOCAB + "--save_counts {tmp}/empty.txt", "--save_counts {tmp}/empty.txt: cannot read"),
    (VOCAB + "--languages en,klingon", "--languages 'klingon' is unknown"),
    (VOCAB + "--scripts Tengwar", "--scripts 'Tengwar' is unknown"),
    (VOCAB + "--to_tokenizer nowhere/at/all", "--to_tokenizer nowhere/at/all"),
    ("apply nothing.json {home}/base out", "error: cannot read nothing.json"),
    ("apply {tmp}/other.jsonl {home}/base out", "error: {tmp}/other.jsonl is not a pruning plan"),
    ("apply {home}/pruned/pruning_plan.json {home}/pruned out", "the plan was made for another model"),
    ("report nowhere", "error: there is no folder nowhere"),
    ("report --runs nowhere", "--runs nowhere: there is no folder nowhere"),
    (PRUNE + "--target_config {tmp}/object.json", "--target_config {tmp}/object.json holds no config"),
    # models
    ("prune '' --output out --eval_datasets ''", "the model has no name: give an alias"),
    ("inspect ~no-such-user/model", "a path begins with ~ and a user that this machine does not have"),
    ("prune nowhere/at/all --output out --eval_datasets ''", "error: there is no model folder nowhere/at/all"),
    ("prune --model nowhere/at/all --output out", "--model nowhere/at/all: there is no model folder"),
    ("prune nowhere.json --output out", "there is no file or folder nowhere.json"),
    ("inspect {home}/base --layer 99", "--layer 99 is out of range: give 0 to 2, or -1 for all"),
    ("inspect {home}/base/config.json --verify", "config.json is a config alone, without weights to read"),
    ("inspect {home}/base --layer -2", "--layer -2 is out of range"),
    ("prune {tmp}/bare --output out --eval_datasets ''", "holds no safetensors weights"),
    ("evaluate {home}/base nowhere/at/all --datasets {home}/text.txt", "error: there is no model folder"),
    ("evaluate {home}/base {tmp}/bare --datasets {home}/text.txt", "error: {tmp}/bare"),
    ("recover {home}/base --output out --method distill", "give it as --teacher"),
    (RECOVER + "--method distill --teacher nowhere/at/all", "--teacher nowhere/at/all"),
    (RECOVER + "--objective ul2", "--objective ul2 is for encoder-decoders"),
    (RECOVER + "--lora_target_modules q_prj", "--lora_target_modules q_prj is in no layer"),
    (RECOVER + "--optim sgdd", "--optim 'sgdd' is not valid"),
    ("to-uniform nowhere/at/all out", "error: there is no model folder nowhere/at/all"),
    ("vocab nowhere/at/all --keep 400 --corpus {home}/text.txt --output out", "error: there is no model folder"),
    ("apply {home}/pruned/pruning_plan.json nowhere/at/all out", "error: there is no model folder nowhere/at/all"),
    ("chat {home}/base nowhere/at/all", "error: there is no model folder nowhere/at/all"),
    # outputs
    (PRUNE + "--output /", "cannot write /: name a folder in it"),
    (VOCAB + "--output /", "cannot write /: name a folder in it"),
    (PRUNE + "--push_to_hub a/b/c", "--push_to_hub 'a/b/c' is not valid: give user/name"),
    (PRUNE + "--output {tmp}/file/out", "file"),
    (PRUNE + "--output {tmp}/foreign", "is not ours to replace"),
    (PRUNE + "--score_cache {tmp}/file", "--score_cache {tmp}/file: cannot write"),
    (EVALUATE + "--output {tmp}/file", "--output {tmp}/file: cannot write"),
    (EVALUATE + "--output /proc/nowhere", "--output /proc/nowhere: cannot write"),
    (RECOVER + "--output {tmp}/file/out", "--output {tmp}/file/out: cannot write"),
    (RECOVER + "--output {home}/pruned", "is the model to be trained"),
    (RECOVER + "--method distill --teacher_cache {tmp}/file", "--teacher_cache {tmp}/file: cannot write"),
    (VOCAB + "--output {tmp}/foreign", "--output {tmp}/foreign", "is not ours to replace"),
    (VOCAB + "--output {home}/base", "is the model that is read"),
    (VOCAB + "--save_counts {tmp}/file/counts.json", "--save_counts {tmp}/file/counts.json: cannot write"),
    ("apply {home}/pruned/pruning_plan.json {home}/base {home}/base", "is the model that is read"),
    ("to-uniform {home}/pruned {tmp}/foreign", "{tmp}/foreign", "is not ours to replace"),
    ("to-uniform {home}/pruned {home}/pruned", "is the model that is read"),
    ("demo --output {tmp}/foreign", "--output {tmp}/foreign", "is not ours to replace"),
    ("evaluate/perplexity.py --model {home}/base --dataset nothing.txt", "--dataset nothing.txt: no data set"),
    ("evaluate/perplexity.py --model {home}/base --output {tmp}", "--output {tmp}: cannot write"),
    # tasks
    pytest.param(
        (EVALUATE + "--tasks piqua --include_path {tmp}/tasks", "lm-eval has no task 'piqua'"), marks=pytest.mark.slow
    ),
    (EVALUATE + "--tasks piqa --include_path nowhere", "--include_path nowhere is not a folder"),
    (EVALUATE + "--tasks piqa --include_path {tmp}/tasks", "--tasks piqa: the data of piqa is not available"),
]


@pytest.fixture
def sealed(home, home_text, tmp_path, monkeypatch):
    """A working folder with bad inputs, where reading weights fails the test."""

    def read_weights(*_: object, **__: object):
        pytest.fail("weights were read")

    monkeypatch.setattr(load, "_read_model", read_weights)
    inputs = tmp_path / "inputs"
    for name in ("tasks", "bare", "foreign", "work"):
        (inputs / name).mkdir(parents=True)
    (inputs / "file").write_text("a file, where a folder is to be")
    (inputs / "empty.txt").write_text("\n")
    (inputs / "empty.jsonl").write_text("")
    (inputs / "object.json").write_text("{}")
    (inputs / "null.jsonl").write_text('{"text": null}\n')
    (inputs / "other.jsonl").write_text('{"words": "a"}\n')
    (inputs / "bare" / "config.json").write_text((home / "base" / "config.json").read_text())
    (inputs / "foreign" / "thesis.doc").write_text("all my work")
    plan = json.loads((home / "pruned" / "pruning_plan.json").read_text())
    calibration = {"dataset": "python-docs", "samples": 40, "tokens": 16}
    plan["settings"]["refit"] = {"calibration": calibration, "compensation": "least_squares"}
    (inputs / "refitted.json").write_text(json.dumps(plan))
    monkeypatch.chdir(inputs / "work")
    return inputs


def everything_in(*folders):
    return sorted(path for folder in folders for path in folder.rglob("*"))


def refuse(argv, capsys, *folders):
    """Run a command that must be refused; return its error."""
    before = everything_in(*folders)
    name, *rest = argv
    assert (run_command(SCRIPTS[name], rest, name) if name in SCRIPTS else main(argv)) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    assert everything_in(*folders) == before
    return lines[0]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case[0].replace("{home}/", "").replace("{tmp}/", ""))
def test_refused_before_any_work(case, sealed, home, capsys):
    line, *words = (part.format(home=home, tmp=sealed) for part in case)
    error = refuse(shlex.split(line), capsys, sealed, home)
    assert all(word in error for word in words), error


STAGES = [
    ("  - prune: {{}}\n  - recover:\n      max_steps: 2\n      data_path: nothing.jsonl\n", 7, "--data_path nothing"),
    ("  - prune: {{}}\n  - vocab:\n      corpus: {home}/text.txt\n      keep: 0\n", 7, "--keep '0' is not valid"),
    ("  - prune: {{}}\n  - evaluate:\n      datasets: wikitxt2\n", 6, "did you mean wikitext2?"),
    ("  - prune: {{}}\n  - evaluate:\n      models: nowhere/at/all\n", 6, "--model nowhere/at/all"),
    ("  - prune:\n      target_params: 1.5\n", 5, "--target_params '1.5' is not valid"),
    ("  - prune:\n      drop_layers: 7\n", 5, "--drop_layers 7 is out of range"),
    ("  - apply:\n      plan: nothing.json\n", 5, "--plan nothing.json"),
]


@pytest.mark.parametrize("flags", [(), ("--dry_run",)])
@pytest.mark.parametrize(("stages", "number", "words"), STAGES, ids=[words for *_, words in STAGES])
def test_recipes_are_refused_at_their_line(stages, number, words, flags, sealed, home, capsys):
    path = write_recipe(sealed, home, stages.format(home=home))
    error = refuse(["run", str(path), *flags], capsys, sealed, home)
    assert f"recipe.yaml:{number}: " in error and words in error, error


def test_a_recipe_whose_output_cannot_be_written_is_refused(sealed, home, capsys):
    path = write_recipe(sealed, home, "  - prune: {}\n")
    assert "cannot write" in refuse(["run", str(path), "--output", str(sealed / "file")], capsys, sealed, home)


def test_a_dry_run_lists_data_that_the_hub_did_not_give(sealed, home, capsys):
    stages = "  - prune: {calib_dataset: c4}\n  - recover: {data_path: some/where}\n"
    path = write_recipe(sealed, home, stages)
    assert main(["run", str(path), "--dry_run"]) == 0
    captured = capsys.readouterr()
    assert "original" in captured.out
    assert "--calib_dataset c4" in captured.out and "--data_path some/where" in captured.out
    assert "--calib_dataset c4" in refuse(["run", str(path)], capsys, sealed, home)


@pytest.mark.skipif(os.environ.get("USER") == "root" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused(sealed, home, capsys):
    (sealed / "foreign").chmod(0o500)
    line = f"evaluate {home}/base --datasets {home}/text.txt --output {sealed}/foreign/out"
    assert "Permission denied" in refuse(shlex.split(line), capsys, sealed, home)


@pytest.mark.parametrize(
    "line",
    [
        PRUNE + "--preset paper --pruner_type l2 --pruning_ratio 50%",
        PRUNE + "--pruner_type l2 --compensate none --hardware_align false --target_params 90%",
        VOCAB + "--keep 90%",
    ],
)
def test_percent_are_fractions(line, home, home_text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(line.format(home=home))) == 0


def test_percent_are_fractions_in_recipes(home, tmp_path, capsys):
    recipe = write_recipe(tmp_path, home, "  - prune: {preset: paper, pruning_ratio: 50%}\n")
    assert main(["run", str(recipe), "--dry_run"]) == 0
