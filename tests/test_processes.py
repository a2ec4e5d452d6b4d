"""Several processes, each with its share of the calibration set, come to what one process does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.models import build
from safetensors.torch import load_file

import llm_pruner as lp
from llm_pruner.models import processes
from llm_pruner.models.running import relative_difference

TESTS = Path(__file__).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def run(*words, **variables):
    environment = os.environ | {"PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}"} | variables
    return subprocess.run(list(map(str, words)), capture_output=True, text=True, env=environment, cwd=TESTS)


@pytest.mark.parametrize("family", (pytest.param("llama_grouped", marks=pytest.mark.slow), "mixtral"))
def test_two_processes_score_and_refit_as_one_does(tmp_path, family):
    script = TESTS / "helpers" / "shared_calibration.py"
    for command, file in (([sys.executable], "one"), (TORCHRUN, "two")):
        done = run(*command, script, family, tmp_path / file)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (load_file(tmp_path / file) for file in ("one", "two"))
    assert one.keys() == two.keys()
    for name, expected in one.items():
        # Adam divides gradients by their size, so that the rounding of the smallest shows.
        tolerance = 0.01 if name.startswith(("blocks", "lora")) else 1e-4
        assert relative_difference(two[name], expected) < tolerance, name


def test_the_command_on_two_processes_writes_one_folder(tmp_path, tokenizer):
    lp.save(build("llama_grouped", vocab_size=500), tokenizer, tmp_path / "model")
    flags = ["--pruning_ratio", "0.5", "--num_examples", "32", "--calib_seq_len", "16", "--calib_dataset", "general"]
    flags += ["--refit", "ridge", "--self_examples", "0", "--eval_datasets", ""]
    for command, folder in (([sys.executable], "one"), (TORCHRUN, "two")):
        done = run(*command, "-m", "llm_pruner", "prune", tmp_path / "model", tmp_path / folder, *flags)
        assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("parameters: ") == 1, "only the first process logs"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "one", "two"]
    one, two = (lp.load(tmp_path / folder)[0].state_dict() for folder in ("one", "two"))
    for name, expected in one.items():
        assert relative_difference(two[name], expected) < 1e-4, name
    plans = [json.loads((tmp_path / folder / "pruning_plan.json").read_text()) for folder in ("one", "two")]
    kept = [{name: unit["kept"] for name, unit in plan["units"].items()} for plan in plans]
    assert kept[0] == kept[1]


def test_what_several_processes_cannot_do_is_refused(tmp_path, tokenizer, monkeypatch):
    with monkeypatch.context() as patch:  # modules that are imported later would keep it
        patch.setattr(processes, "count", lambda: 3)
        with pytest.raises(lp.PrunerError, match="3 processes cannot have equal shares of 8 calibration samples"):
            processes.own_share(torch.zeros(8, 4))
    lp.save(build("llama_grouped"), tokenizer, tmp_path / "model")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(lp.PrunerError, match="--target_latency times one process"):
        lp.prune(tmp_path / "model", target_latency="0.8", output=tmp_path / "out")
    with pytest.raises(lp.PrunerError, match="2 processes cannot share 36 calibration samples equally"):
        lp.prune(tmp_path / "model", num_examples=36, output=tmp_path / "out")
