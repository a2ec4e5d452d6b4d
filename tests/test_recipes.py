"""Recipes: read, told, run, gone on with."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import AutoConfig

import llm_pruner as lp
from llm_pruner.cli import main
from llm_pruner.recipes.arguments import RunArguments
from llm_pruner.recipes.recipe import read, schema
from llm_pruner.recipes.run import run_recipe as run
from llm_pruner.recipes.stages import STAGES
from llm_pruner.recipes.steps import steps_of
from llm_pruner.recipes.sweep import points_of

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
SMALL = """
model: {home}/base
output: {out}
evaluate: {{datasets: {home}/text.txt, seq_len: 32, max_windows: 4}}
stages:
  - prune:
      name: depth
      num_layers: 2
      depth: loss_change
      num_examples: 8
      calib_seq_len: 16
      compensate: none
  - prune:
      name: width
      target_params: 0.9
      pruner_type: l2
      compensate: none
      hardware_align: false
  - recover:
      data_path: {home}/data.jsonl
      batch_size: 4
      micro_batch_size: 2
      max_steps: 6
      eval_steps: 3
      save_steps: 3
      learning_rate: 1e-3
      warmup_steps: 1
      val_set_size: 4
      lora_r: 2
      cutoff_len: 64
      device: cpu
  - vocab:
      corpus: [{home}/text.txt]
      keep: 400
      eval_dataset: {home}/text.txt
      max_windows: 2
"""


@pytest.fixture
def recipe(home, home_text, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(SMALL.format(home=home, out=tmp_path / "out"))
    return path


def test_stages_follow_each_other(recipe, tmp_path, capsys):
    """Each stage reads what the last one left; a table grows; what is done is not done again, what changes is."""
    out = run(RunArguments(recipe=str(recipe)))
    rows = json.loads((out / "results.json").read_text())
    assert [row["stage"] for row in rows] == ["original", "depth", "width", "recover", "vocab"]
    sizes = [row["parameters"] for row in rows]
    assert sizes[0] > sizes[1] > sizes[2] == sizes[3] > sizes[4]
    assert sizes[2] <= 0.9 * sizes[1]
    assert all(row["perplexity text"] > 1 and 1 < row["per byte text"] < row["perplexity text"] for row in rows)
    assert (out / "results.md").read_text().count("\n") == 7 and "vocab" in (out / "results.csv").read_text()
    folders = {p.name.rpartition("-")[0]: p for p in out.iterdir() if p.name[:2].isdigit()}
    model, tokenizer = lp.load(str(folders["04-vocab"]))
    assert model.config.num_hidden_layers == 2 and len(tokenizer) == 400
    assert model.num_parameters() == sizes[4]
    assert main(["report", str(out), "--output", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert all(folder.name in page for name, folder in folders.items() if name != "04-vocab")
    times = {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")}
    run(RunArguments(recipe=str(recipe)))
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")} == times
    recipe.write_text(recipe.read_text().replace("keep: 400", "keep: 380"))
    run(RunArguments(recipe=str(recipe)))
    after = {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")}
    assert times.items() <= after.items() and len(after) == len(times) + 1


def test_what_is_told_is_what_comes(recipe, tmp_path, capsys):
    """A dry run writes nothing and says the shapes and parameters that the run then gives."""
    assert run(RunArguments(recipe=str(recipe), dry_run=True)) is None
    assert not (tmp_path / "out").exists()
    told = [line.split("│") for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    said = {cells[1].strip(): cells[7].strip().replace(",", "") for cells in told}
    out = run(RunArguments(recipe=str(recipe)))
    for row in json.loads((out / "results.json").read_text()):
        if row["stage"] != "recover":
            assert int(said[row["stage"]]) == row["parameters"]


def test_every_command_is_a_stage():
    """What a command can do, a recipe can: all its arguments but those that the recipe decides."""
    from dataclasses import fields

    for name, kind in STAGES.items():
        decided = {kind.reads, *kind.sets(Path())}
        known = schema()["$defs"][name]["properties"][name]["properties"]
        assert {f.name for f in fields(kind.arguments)} - decided - {None} <= set(known), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("pruner_type: l2", "pruner_typ: l2"), ":16: unknown key 'pruner_typ'; did you mean 'pruner_type'"),
        (("  - vocab:", "  - vocabs:"), ":32: unknown stage 'vocabs'; did you mean 'vocab'"),
        (("num_examples: 8", "num_examples: many"), ":10: num_examples is 'many'; it takes integer or null"),
        (("model:", "modle:"), "unknown key 'modle'; did you mean 'model'"),
        (("stages:", "stages: {"), ".yaml:"),
        (("keep: 400", "keep: 400\n      keep: 5"), ":35: keep is there twice"),
        (
            ("target_params: 0.9", "target_params: 0.9\n      target_macs: 0.5"),
            ":13: --target_params and --target_macs",
        ),
        (("device: cpu", "base_model: x"), "unknown key 'base_model'"),
        (("name: width", "name: depth"), ":13: two stages are called 'depth'"),
        (("name: width", "name: ../../up"), "name"),
        (("seq_len: 32", "seq_len: 32, dtype: int3"), ":4: unknown --dtype 'int3'"),
        (("seq_len: 32", "seq_len: 32, models: [x]"), "unknown key 'models'"),
        (("  - vocab:", "  - apply: {}\n  - vocab:"), ":32: give a plan, a checkpoint"),
        (("learning_rate: 1e-3", "learning_rate: !!python/object:os.system x"), "could not determine a constructor"),
    ],
)
def test_mistakes_are_named_with_their_line(recipe, tmp_path, change, message, capsys):
    assert change[0] in recipe.read_text()
    recipe.write_text(recipe.read_text().replace(*change, 1))
    assert main(["run", str(recipe)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_files_that_are_no_recipe(tmp_path, capsys):
    for content in ("", "just words", "- 1\n- 2", "a: [", "\x00", "a: &a [*a]\n", "? [1]\n: 2\n"):
        path = tmp_path / "recipe.yaml"
        path.write_text(content)
        assert main(["run", str(path)]) == 2
        assert capsys.readouterr().err.startswith("error: ")
    assert main(["run", str(tmp_path / "none.yaml")]) == 2
    assert main(["run"]) == 2


def test_numbers_may_be_written_as_people_do(recipe):
    recipe.write_text(recipe.read_text().replace("learning_rate: 1e-3", "learning_rate: 1e-3\n      weight_decay: 0"))
    recipe.write_text(recipe.read_text().replace("max_steps: 6", "max_steps: 6e0"))
    args = [step.arguments() for step in steps_of(read(recipe))]
    assert args[2].max_steps == 6 and isinstance(args[2].max_steps, int)
    assert args[2].learning_rate == 1e-3 and args[2].weight_decay == 0.0 and args[1].target_params == "0.9"
    assert args[3].keep == "400" and "," not in args[3].corpus


def test_stages_of_one_command_need_names(recipe):
    recipe.write_text(recipe.read_text().replace("      name: width\n", "").replace("      name: depth\n", ""))
    with pytest.raises(lp.PrunerError, match="two stages are called 'prune'"):
        read(recipe)


def test_others_are_measured_beside_the_model_at_hand(home, home_text, tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        f"model: {home}/base\noutput: {tmp_path}/out\nstages:\n"
        f"  - prune: {{pruner_type: l2, preset: paper, hardware_align: false}}\n"
        f"  - evaluate: {{models: [{home}/base], datasets: {home_text}, seq_len: 16, max_windows: 2, tokens: 0}}\n"
    )
    out = run(RunArguments(recipe=str(tmp_path / "recipe.yaml")))
    (file,) = out.glob("*/evaluation.json")
    first, second = json.loads(file.read_text())["models"]
    assert first["model"] == f"{home}/base" and second["parameters"] < first["parameters"]


def test_how_far_a_recipe_is(recipe, capsys):
    with pytest.raises(lp.PrunerError, match="nothing was run yet"):
        run(RunArguments(recipe=str(recipe), status=True))
    run(RunArguments(recipe=str(recipe)))
    capsys.readouterr()
    run(RunArguments(recipe=str(recipe), status=True))
    said = capsys.readouterr().out
    assert said.count("done") == 4 and "waiting" not in said


def test_only_one_at_a_time(recipe, tmp_path):
    from llm_pruner.files import folder_lock

    with folder_lock(tmp_path / "out", "recipe"), pytest.raises(lp.PrunerError, match="another process is at work"):
        run(RunArguments(recipe=str(recipe)))


def test_killed_and_run_again_it_ends_the_same(recipe, tmp_path):
    """SIGKILL at several moments; the same command then finishes what is missing, with the same table."""
    whole = tmp_path / "whole"
    run(RunArguments(recipe=str(recipe), output=str(whole)))
    command = [sys.executable, "-m", "llm_pruner", "run", str(recipe)]
    for moment in (9, 11, 14):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        process.wait()
    out = run(RunArguments(recipe=str(recipe)))

    def table(folder):
        rows = json.loads((folder / "results.json").read_text())
        return [{k: v for k, v in row.items() if k not in ("seconds", "folder")} for row in rows]

    assert table(out) == table(whole)


CONFIGS = {
    "llm_pruner_llama7b": ("llama", {"vocab_size": 32000}),
    "pruning_llms_7b_to_3.4b": (
        "llama",
        {
            "hidden_size": 5120,
            "intermediate_size": 13824,
            "num_hidden_layers": 40,
            "num_attention_heads": 40,
            "vocab_size": 32000,
        },
    ),
    "openba_v2_5_stages": (
        "t5",
        {
            "d_model": 2048,
            "d_ff": 5120,
            "num_layers": 24,
            "num_decoder_layers": 24,
            "num_heads": 32,
            "d_kv": 64,
            "vocab_size": 32128,
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,
        },
    ),
    "minitron_style": (
        "llama",
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
        },
    ),
    "llmpruner_bloom_zh": (
        "bloom",
        {"hidden_size": 1024, "n_layer": 24, "n_head": 16, "vocab_size": 250880},
    ),
}
LEAVES = {
    "llm_pruner_llama7b": {"prune": 5_422_977_024},
    "pruning_llms_7b_to_3.4b": {"to-7b": 6_738_415_616},
}


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_the_recipes_can_be_told(name, tmp_path, capsys):
    """Every recipe of the repository, on a config of its model's size; what papers say of sizes comes out."""
    kind, fields = CONFIGS[name]
    AutoConfig.for_model(kind, **fields).save_pretrained(tmp_path / "model")
    assert main(["run", str(RECIPES / f"{name}.yaml"), "--model", str(tmp_path / "model"), "--dry_run", "true"]) == 0
    told = [line.split("│") for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    said = {cells[1].strip(): cells[7].strip().replace(",", "") for cells in told}
    for stage, parameters in LEAVES.get(name, {}).items():
        assert int(said[stage]) == parameters


def test_every_recipe_is_tested():
    assert {p.stem for p in RECIPES.glob("*.yaml")} == {*CONFIGS, "smollm2_demo"}
    read(RECIPES / "smollm2_demo.yaml")


def test_the_paper_s_tables(tmp_path, capsys):
    """Every table can be read, one is told on LLaMA-7B's config, and its numbers stand beside the published ones."""
    counts = {p.stem: len(points_of(read(p))) for p in (RECIPES / "paper").glob("*.yaml")}
    assert counts["smollm2"] == 96 and counts["llama7b_20"] == counts["vicuna7b_50_tuned"] == 6
    kind, fields = CONFIGS["llm_pruner_llama7b"]
    AutoConfig.for_model(kind, **fields).save_pretrained(tmp_path / "model")
    recipe = str(RECIPES / "paper" / "llama7b_20.yaml")
    assert main(["run", recipe, "--model", str(tmp_path / "model"), "--dry_run"]) == 0
    assert "3072" in capsys.readouterr().out  # the hidden size of the point that prunes channels
    out = tmp_path / "llama7b_20"
    out.mkdir()
    rows = [{"point": 0, "perplexity wikitext2": 12.62, "piqa acc": 0.1, "piqa acc_norm": 0.78}]
    rows.append({"point": 5, "prune.taylor": "param_second", "perplexity wikitext2": 20.5})
    (out / "results.json").write_text(json.dumps(rows))
    script = [sys.executable, str(RECIPES / "paper" / "beside.py")]
    said = subprocess.run([*script, str(out)], capture_output=True, text=True, check=True).stdout
    assert "| unpruned | 12.62 / 12.6 | - / 22.1 | - / 73.2 | 78 / 78.4 |" in said
    assert "| param_second | 20.5 / 19.8 |" in said
    failed = subprocess.run([*script, str(tmp_path)], capture_output=True, text=True)
    assert failed.returncode == 1 and "it has llama7b_20" in failed.stderr
