"""The last lines of every run that writes a model: each can be copied and works."""

import re
import shlex

import pytest
from transformers import T5Config, T5ForConditionalGeneration

import llm_pruner as lp
from llm_pruner.checkpoint.next_steps import next_steps
from llm_pruner.cli import _name_positionals, main
from llm_pruner.commands import COMMANDS
from llm_pruner.flags import parse_flags

PRUNE = ["--pruner_type", "l2", "--compensate", "none", "--eval_datasets", "", "--device", "cpu"]
TRAIN = ["--max_steps", "1", "--batch_size", "2", "--micro_batch_size", "2", "--cutoff_len", "64", "--device", "cpu"]
WHOLE = [
    "--kinds",
    "neurons",
    "--block_mlp_layer_start",
    "0",
    "--block_mlp_layer_end",
    "3",
    "--hardware_align",
    "false",
]


@pytest.fixture
def run(home, home_text, tmp_path, monkeypatch, capfd):
    """Run a command on ``base``, ``pruned`` or ``uniform``; return its last lines by their first words."""
    monkeypatch.chdir(tmp_path)
    for name in ("base", "pruned", "uniform"):
        (tmp_path / name).symlink_to(home / name)
    (tmp_path / "data.jsonl").symlink_to(home / "data.jsonl")
    (tmp_path / "text.txt").symlink_to(home_text)

    def run(*argv):
        assert main(list(argv)) == 0
        return steps_in(capfd.readouterr().err.splitlines())

    return run


def steps_in(lines):
    found = [re.search(r"(model|load|serve|next|page): +(.*)", line) for line in lines[-6:]]
    return {one[1]: one[2] for one in found if one}


def loaded(steps):
    """The model that the line of Python loads."""
    names = {}
    exec(steps["load"], names)
    return names["model"]


def arguments_of(line):
    """The flags of a command line, read as the command reads them; they pass its check."""
    program, name, *argv = shlex.split(line)
    assert program == "llm-pruner"
    arguments = parse_flags(COMMANDS[name].arguments_class, _name_positionals(COMMANDS[name], argv))
    COMMANDS[name].check_arguments(arguments)
    return arguments


def test_pruned_layers_that_differ(run):
    steps = run("prune", "base", "out", *PRUNE)
    model, base = loaded(steps), lp.load("base")[0]
    sizes = [sum(p.numel() for p in m.parameters()) for m in (model, base)]
    share = f"{sizes[0] / sizes[1]:.3f}"
    assert steps["model"] == f"out ({sizes[0]:,} parameters, {share} times the original's, {sizes[1]:,})"
    assert steps["load"].startswith("import llm_pruner; from transformers import AutoModelForCausalLM; ")
    assert steps["serve"] == "vllm serve out  # with llm_pruner installed beside vLLM"
    assert arguments_of(steps["next"]).model == "out" and arguments_of(steps["next"]).merge


def test_pruned_layers_that_are_alike(run):
    steps = run("prune", "base", "out", *PRUNE, *WHOLE)
    assert steps["serve"] == "vllm serve out"
    assert steps["load"].startswith("from transformers import") and loaded(steps).config.intermediate_size == 32


def test_standalone_needs_no_import(run):
    steps = run("prune", "base", "out", *PRUNE, "--standalone")
    assert "import llm_pruner" not in steps["load"] and "trust_remote_code=True" in steps["load"]
    assert steps["serve"].startswith("vllm serve out  # with llm_pruner")


def test_nothing_to_load_without_a_checkpoint(run):
    assert run("prune", "base", *PRUNE, "--no_save") == {}


@pytest.mark.parametrize("merge", [False, True])
def test_recovered(run, merge):
    steps = run("recover", "pruned", "out", "--data_path", "data.jsonl", *TRAIN, *["--merge"] * merge)
    folder = "out/merged" if merge else "out"
    assert steps["model"].startswith(f"{folder} (") and "times the original's" in steps["model"]
    assert loaded(steps).config.num_hidden_layers == 3
    compared = arguments_of(steps["next"]).model
    assert compared[0].endswith("/base") and compared[1:] == ["pruned", folder]
    if merge:
        assert steps["serve"] == "vllm serve out/merged  # with llm_pruner installed beside vLLM"
        return
    merging, serving = steps["serve"].split(" && ")
    exec(shlex.split(merging)[2], {})
    assert serving.startswith("vllm serve out-merged  # ")


def test_vocabulary(run):
    text = ["--corpus", "text.txt", "--eval_dataset", "text.txt", "--max_windows", "2"]
    steps = run("vocab", "base", "out", "--keep", "0.8", *text)
    assert loaded(steps).config.vocab_size < 500 and steps["serve"] == "vllm serve out"
    assert arguments_of(steps["next"]).model == ["base", "out"]


def test_commands_on_files(run):
    steps = run("apply", "pruned/pruning_plan.json", "base", "out")
    assert loaded(steps).config.num_hidden_layers == 3 and arguments_of(steps["next"]).model == "out"
    assert "times the original's" in steps["model"]
    steps = run("to-uniform", "pruned", "plain", "--allow_padding")
    assert "times those of pruned" in steps["model"]
    assert loaded(steps).config.intermediate_size == 64 and steps["serve"] == "vllm serve plain"
    assert arguments_of(steps["next"]).model == ["pruned", "plain"]


def test_a_recipe_says_it_once(run, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    prune = "{pruner_type: l2, compensate: none, device: cpu}"
    recipe.write_text(f"model: base\noutput: out\nstages:\n  - prune: {prune}\n")
    steps = run("run", str(recipe))
    (folder,) = (path for path in (tmp_path / "out").glob("01-prune-*") if path.is_dir())
    assert steps["model"].startswith(f"out/{folder.name} (") and loaded(steps) is not None
    assert arguments_of(steps["page"]).runs == ["out"]
    assert (tmp_path / "out" / "run.log").read_text().count(" model: ") == 1


def test_encoder_decoders_are_not_served_by_vllm(tmp_path):
    config = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0)
    lp.save(T5ForConditionalGeneration(config), None, tmp_path / "t5")
    steps = steps_in(next_steps(tmp_path / "t5", "prune"))
    assert type(loaded(steps)).__name__ == "T5ForConditionalGeneration"
    assert steps["serve"] == f"llm-pruner chat {tmp_path / 't5'}" and arguments_of(steps["serve"]).model
