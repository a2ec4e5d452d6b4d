"""Bad input of any kind: a line that says what is wrong; no traceback, no hang, no file outside the output folder."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from helpers.fuzzing import SOME, harmed, linked, refused_or_done, sizes_of
from hypothesis import assume, given
from hypothesis import strategies as st

import llm_pruner as lp
from llm_pruner.checkpoint.apply_files import apply_to_files
from llm_pruner.checkpoint.shards import Shards
from llm_pruner.cli import COMMANDS, main
from llm_pruner.recipes.recipe import read
from llm_pruner.recipes.sweep import points_of


@pytest.fixture(scope="module")
def folder(home, tmp_path_factory):
    """A model in several shards, small enough to be read over and over."""
    out = tmp_path_factory.mktemp("fuzz")
    shutil.copytree(home / "pruned", out / "pruned")
    model, tokenizer = lp.load(str(home / "uniform"))
    model.save_pretrained(out / "sharded", max_shard_size="60KB")
    tokenizer.save_pretrained(out / "sharded")
    return out


def tree(path: Path):
    return sorted(str(p.relative_to(path)) for p in path.rglob("*"))


@SOME
@given(data=st.data())
def test_plans(folder, home, tmp_path_factory, data):
    """Any plan is read and applied, or refused; nothing else is written."""
    document = data.draw(harmed(json.loads((folder / "pruned/pruning_plan.json").read_text())))
    place = tmp_path_factory.mktemp("plan")
    (place / "plan.json").write_text(json.dumps(document))
    refused_or_done(lambda: apply_to_files(lp.PruningPlan.load(place / "plan.json"), str(home / "base"), place / "out"))
    assert set(tree(place)) <= {"plan.json", "out", *(f"out/{p.name}" for p in (place / "out").glob("*"))}
    shutil.rmtree(place)


@SOME
@given(data=st.data())
def test_index_files(folder, tmp_path_factory, data):
    place = tmp_path_factory.mktemp("index")
    index = "model.safetensors.index.json"
    linked(folder / "sharded", place, index)
    document = data.draw(harmed(json.loads((folder / "sharded" / index).read_text())))
    (place / index).write_text(json.dumps(document))
    refused_or_done(lambda: [Shards(place).read(name) for name in Shards(place).tensors])
    shutil.rmtree(place)


@SOME
@given(data=st.data())
def test_configs(folder, tmp_path_factory, data):
    """transformers itself takes much without a word; what it raises reaches the user as one line."""
    place = tmp_path_factory.mktemp("config")
    document = data.draw(harmed(json.loads((folder / "sharded/config.json").read_text()), most=2))
    assume(len(sizes_of(document)) <= 1)  # a vocabulary of 2**63 is a matter of memory
    linked(folder / "sharded", place, "config.json")
    (place / "config.json").write_text(json.dumps(document))
    assert main(["inspect", str(place)]) in (0, 2)
    shutil.rmtree(place)


@SOME
@given(data=st.data())
def test_tokenizer_files(folder, tmp_path_factory, data):
    place = tmp_path_factory.mktemp("tokenizer")
    whole = json.loads((folder / "sharded/tokenizer.json").read_text())
    document = data.draw(harmed(whole))
    linked(folder / "sharded", place, "tokenizer.json")
    (place / "tokenizer.json").write_text(json.dumps(document))
    text = place / "corpus.txt"
    text.write_text("some words of the corpus\n" * 9)
    argv = ["vocab", str(place), "--corpus", str(text), "--keep", "0.9", "--output_dir", str(place / "out")]
    assert main([*argv, "--eval_dataset", str(text), "--max_windows", "1"]) in (0, 2)
    assert not [p for p in place.iterdir() if p.name.startswith(".")]
    shutil.rmtree(place)


RECIPE = """
model: base
output: out
evaluate: {datasets: text.txt, max_windows: 4}
stages:
  - prune: {name: width, pruning_ratio: 0.5, taylor: param_first}
  - recover: {method: lora, max_steps: 3, learning_rate: 1e-3}
  - vocab: {corpus: [a.txt, b.txt], keep: 0.8}
  - prune: {name: mended, target_params: 0.8, refit: distill, refit_tokens: 2000, calib_dataset: "general:3,self:1"}
  - apply: {plan: plan.json, refit: true}
  - to-uniform: {}
sweep:
  grid: {width.pruning_ratio: [0.2, 0.5]}
  zip: {recover.max_steps: [1, 2], vocab.keep: [0.5, 0.6]}
seeds: [0, 1]
executor: {kind: local, jobs: 2}
"""


@SOME
@given(data=st.data())
def test_recipes(tmp_path_factory, data):
    file = tmp_path_factory.getbasetemp() / "recipe.yaml"
    file.write_text(yaml.safe_dump(data.draw(harmed(yaml.safe_load(RECIPE)))), encoding="utf-8")
    refused_or_done(lambda: points_of(read(file)))


@SOME
@given(data=st.data())
def test_recipes_as_text(tmp_path_factory, data):
    """Characters put in anywhere: YAML's own errors too are one line."""
    at = data.draw(st.integers(0, len(RECIPE)))
    extra = data.draw(
        st.one_of(st.text(max_size=12), st.sampled_from(["&a [*a]", "!!python/object:os.system x", "\t", "? "]))
    )
    file = tmp_path_factory.getbasetemp() / "recipe.yaml"
    file.write_text(RECIPE[:at] + extra + RECIPE[at + data.draw(st.integers(0, 20)) :], encoding="utf-8")
    refused_or_done(lambda: points_of(read(file)))


WORDS = st.one_of(
    st.text(max_size=6).filter(lambda t: not t.startswith("-")),
    st.sampled_from(["0.5", "-1", "nan", "inf", "1e9", "../x", "/nowhere", "taylor", "true", "", "python-docs", "0"]),
)


@SOME
@given(data=st.data())
def test_arguments(tmp_path_factory, data, capsys):
    """Any flags with any values, of a model that is not there: an error before anything is written."""
    command = data.draw(st.sampled_from([name for name in COMMANDS if name not in ("chat", "demo")]))
    names = [f.name for f in fields(COMMANDS[command].arguments_class)]
    argv = [command]
    for _ in range(data.draw(st.integers(0, 5))):
        argv += ["--" + data.draw(st.one_of(st.sampled_from(names), st.text(max_size=5))), data.draw(WORDS)]
    reads = {"prune": "base_model", "recover": "prune_model", "evaluate": "models", "report": "runs", "run": "recipe"}
    reads |= {"apply": "checkpoint", "to-uniform": "checkpoint"}
    argv += ["--" + reads.get(command, "model"), "./not-there"]
    place = tmp_path_factory.mktemp("arguments")
    before, here = os.environ.copy(), os.getcwd()
    os.chdir(place)
    try:
        code = main(argv)
    except SystemExit as error:  # argparse's own way
        code = error.code
    finally:
        os.chdir(here)
        os.environ.clear()
        os.environ.update(before)
    assert code in (0, 2), argv
    assert "Traceback" not in capsys.readouterr().err
    assert all(p.suffix in (".log", "") for p in place.rglob("*")), tree(place)
    shutil.rmtree(place)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plan", "recipe", "index", "counts", "tensors", "rows"])
def test_bytes(kind):
    """Guided by coverage, a minute of each."""
    pytest.importorskip("atheris", reason="atheris is not installed (pip install atheris)")
    script = [sys.executable, str(Path(__file__).parent / "helpers" / "fuzz_bytes.py"), kind, "-max_total_time=60"]
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
