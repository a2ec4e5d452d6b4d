"""The commands as a user runs them: flags, outputs, exit codes."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.models import build
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import llm_pruner as lp
from llm_pruner.cli import _explain_out_of_memory, main, run_command
from llm_pruner.commands import COMMANDS, SCRIPTS

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def folder(tmp_path):
    """A tiny checkpoint with a tokenizer, and some text."""
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, 96)}, unk_token="w2"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    lp.save(build("llama"), tokenizer, tmp_path / "model")
    lines = "\n\n".join(" ".join(f"w{2 + (i * j) % 94}" for j in range(40)) for i in range(1, 21))
    (tmp_path / "text.txt").write_text(lines)
    return tmp_path


def flags(folder, *extra):
    return [
        *("--base_model", str(folder / "model"), "--output_root", str(folder / "runs")),
        *("--calib_dataset", str(folder / "text.txt"), "--eval_datasets", str(folder / "text.txt")),
        *("--calib_seq_len", "16", "--max_seq_len", "16", "--device", "cpu", "--eval_device", "cpu", *extra),
    ]


def script(name, *argv):
    return run_command(SCRIPTS[name], argv, name)


def hf_prune(folder, *extra):
    return script("hf_prune.py", *flags(folder, *extra))


DOCUMENTED = [
    *("--pruning_ratio", "0.25", "--block_wise", "--pruner_type", "taylor", "--taylor", "param_first"),
    *("--block_mlp_layer_start", "1", "--block_mlp_layer_end", "3"),
    *("--block_attention_layer_start", "1", "--block_attention_layer_end", "3"),
    *("--save_ckpt_log_name", "llama_prune", "--test_after_train", "--save_model"),
]


def test_the_documented_command(folder):
    assert hf_prune(folder, *DOCUMENTED) == 0
    out = folder / "runs" / "llama_prune"
    metrics = json.loads((out / "metrics.json").read_text())
    plan = lp.PruningPlan.load(out / "pruning_plan.json")
    assert {c.layer for c in plan.units.values()} == {1, 2}
    assert metrics["parameters_after"] < metrics["parameters_before"]
    assert metrics["mask_equivalence"]["relative"] < 1e-5
    name = str(folder / "text.txt")
    assert metrics["before"]["perplexity"][name]["perplexity"] != metrics["after"]["perplexity"][name]["perplexity"]
    assert len(metrics["after"]["samples"]) == 3 and metrics["seed"] == 42 and metrics["peak_rss_gib"] > 0
    assert {"load", "trace", "score", "select", "apply", "save"} <= metrics["seconds"].keys()
    assert {"torch", "transformers", "llm_pruner", "python"} <= metrics["versions"].keys()
    assert "perplexity after pruning" in (out / "prune.log").read_text()
    model = AutoModelForCausalLM.from_pretrained(out)
    assert sum(p.numel() for p in model.parameters()) == metrics["parameters_after"]
    assert hf_prune(folder, *DOCUMENTED) == 0, "the same run again replaces the folder"
    assert [p.name for p in (folder / "runs").iterdir()] == ["llama_prune"]


def test_a_checkpoint_is_not_lost_to_a_run_without_one(folder, capsys):
    assert hf_prune(folder, "--save_model", "--save_ckpt_log_name", "a") == 0
    first = (folder / "runs" / "a" / "model.safetensors").read_bytes()
    capsys.readouterr()
    assert hf_prune(folder, "--save_ckpt_log_name", "a") == 0
    lines = capsys.readouterr().err.splitlines()
    assert "a-2: " in lines[0] and "holds another run" in lines[0]
    assert "no checkpoint will be kept: add --save_model, or --output FOLDER" in lines[2] and "loaded" in lines[3]
    again = ["--base_model", str(folder / "runs" / "a"), "--output", str(folder / "runs" / "a")]
    assert hf_prune(folder, *again) == 2
    assert "is the model to be pruned" in capsys.readouterr().err
    assert (folder / "runs" / "a" / "model.safetensors").read_bytes() == first
    assert not (folder / "runs" / "a-2" / "model.safetensors").exists()


HALF_OF_LAYER_2 = {"2": {"intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}}


@pytest.mark.parametrize(
    ("extra", "check"),
    [
        ("--channel_wise", lambda c: c.hidden_size == 16),
        ("--channel_wise --pruning_ratio 0.3", lambda c: c.hidden_size == 24),  # 22 is no multiple of the 4 heads
        ("--layer_wise --layer 2", lambda c: c.num_hidden_layers == 2),
        ("--block_mlp_layer_start 0 --block_mlp_layer_end 3 --iterative_steps 3", lambda c: c.intermediate_size == 24),
        ("--pruner_type l1 --grouping_strategy max --round_to 16", lambda c: _neurons(c) == 32),
        (
            "--taylor param_first --grouping_strategy none",
            lambda c: c.to_dict()["per_layer_config"] == HALF_OF_LAYER_2,
        ),
        (
            "--pruner_type random --seed 7 --global_pruning",
            lambda c: c.to_dict()["per_layer_config"] == HALF_OF_LAYER_2,
        ),
        (
            "--taylor vectorize --grouping_strategy prod --calib_seed 3 --num_examples 4",
            lambda c: c.to_dict()["per_layer_config"] == HALF_OF_LAYER_2,
        ),
        (
            "--taylor param_mix --test_before_train --temperature 0.7 --top_p 0.9",
            lambda c: c.to_dict()["per_layer_config"] == HALF_OF_LAYER_2,
        ),
        ("--pruner_type l2 --target_params 31.5K", lambda c: c.per_layer_config[2].intermediate_size == 37),
        ("--taylor param_second --dtype bfloat16", lambda c: c.dtype == torch.bfloat16),
    ],
)
def test_every_mode(folder, extra, check):
    assert hf_prune(folder, *extra.split(), "--save_model", "--save_ckpt_log_name", "run") == 0
    model = AutoModelForCausalLM.from_pretrained(folder / "runs" / "run")
    assert check(model.config)
    metrics = json.loads((folder / "runs" / "run" / "metrics.json").read_text())
    assert metrics["parameters_after"] < metrics["parameters_before"]
    assert ("samples" in metrics["before"]) == ("--test_before_train" in extra)


def test_criteria_of_forward_passes_and_compensation(folder):
    lines = [" ".join(f"w{2 + (i * j + i) % 94}" for j in range(20)) for i in range(1, 41)]
    (folder / "text.txt").write_text("\n\n".join(lines))
    shared = ("--pruning_ratio", "0.5", "--pruner_type", "wanda", "--num_examples", "40", "--save_model")
    assert hf_prune(folder, *shared, "--save_ckpt_log_name", "plain") == 0
    assert hf_prune(folder, *shared, "--save_ckpt_log_name", "refit", "--compensate", "least_squares") == 0
    plain, refit = (AutoModelForCausalLM.from_pretrained(folder / "runs" / name) for name in ("plain", "refit"))
    changed = [n for n, p in plain.named_parameters() if not torch.equal(p, refit.get_parameter(n))]
    assert {name.split(".")[-2] for name in changed} == {"o_proj", "down_proj", "norm"}
    report = json.loads((folder / "runs" / "refit" / "metrics.json").read_text())["compensation"]
    refitted = {r["module"] + ".weight" for r in report["layers"] if r["ridge"]}
    assert refitted | {"model.norm.weight"} == set(changed) and report["temperature"] != 1


def test_presets(folder, capsys):
    """A preset is a set of defaults: what is given wins over it and changes nothing else."""
    lines = [" ".join(f"w{2 + (i * j + i) % 94}" for j in range(20)) for i in range(1, 41)]
    (folder / "text.txt").write_text("\n\n".join(lines))
    outcome = {}
    for name, extra in {
        "default": "--refit_tokens 1000",
        "paper": "--preset paper",
        "fast": "--preset fast --refit_tokens 1000",
        "wanda": "--refit ridge --pruner_type wanda",
        "vectorize": "--refit ridge --taylor vectorize",
        "heads": "--refit ridge --block_attention_layer_start 0",
        "kinds": "--refit ridge --kinds heads",
    }.items():
        argv = flags(folder, *extra.split(), "--save_ckpt_log_name", name)
        assert main(["prune", *argv]) == 0
        plan = lp.PruningPlan.load(folder / "runs" / name / "pruning_plan.json")
        metrics = json.loads((folder / "runs" / name / "metrics.json").read_text())
        kinds = {c.kind for c in plan.units.values()}
        examples = metrics["arguments"]["num_examples"]
        outcome[name] = (plan.settings.get("taylor"), kinds, "compensation" in metrics, examples)
        assert ("refit" in metrics) == (name in ("default", "fast"))
    assert outcome["default"] == ("param_second", {"neurons"}, True, 128)
    assert outcome["fast"] == ("param_second", {"neurons"}, True, 64)
    assert outcome["paper"] == ("param_first", {"heads", "neurons"}, False, 10)
    assert outcome["wanda"] == (None, {"neurons"}, True, 128)
    assert outcome["vectorize"] == ("vectorize", {"neurons"}, True, 128)
    assert outcome["heads"] == ("param_second", {"heads", "neurons"}, True, 128)
    assert outcome["kinds"][1] == {"heads"}
    assert "gives 40 samples of 16 tokens, not 128" in capsys.readouterr().err


def _neurons(config):
    return min(layer.intermediate_size for layer in config.per_layer_config)


def test_iterative_steps_score_anew(folder):
    plans = {}
    for steps in ("1", "3"):
        name = f"steps{steps}"
        method = ("--preset", "paper", "--iterative_steps", steps)
        assert hf_prune(folder, *method, "--save_ckpt_log_name", name) == 0
        plans[steps] = lp.PruningPlan.load(folder / "runs" / name / "pruning_plan.json")
    one, three = (
        {n: c.kept.tolist() for n, c in p.units.items() if c.kind == "neurons"} for p in (plans["1"], plans["3"])
    )
    assert {n: len(k) for n, k in one.items()} == {n: len(k) for n, k in three.items()}
    assert one != three


def test_the_same_run_gives_the_same_bits(folder):
    for name in ("a", "b"):
        assert hf_prune(folder, "--save_model", "--save_ckpt_log_name", name) == 0
    a, b = (folder / "runs" / n / "model.safetensors" for n in ("a", "b"))
    assert a.read_bytes() == b.read_bytes()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("--pruning_ratio 1.5", "out of range"),
        ("--pruning_ratio 0", "out of range"),
        ("--pruner_type magic", "choose from random, l1, l2, taylor"),
        ("--taylor third", "choose from"),
        ("--grouping_strategy median", "choose from"),
        ("--grouping_strategy none --channel_wise", "leave out --channel_wise"),
        ("--grouping_strategy none --global_pruning", "leave out --global_pruning"),
        ("--grouping_strategy none --kinds heads,experts", "leave out --kinds experts"),
        ("--grouping_strategy none --preset best", "add --refit none, or --preset paper"),
        ("--base_model /no/such/folder", "no model folder"),
        ("--calib_dataset nothing.txt", "no data set"),
        ("--eval_datasets nothing.txt", "no data set"),
        ("--calib_seq_len 63", "longest document has 40"),
        ("--block_mlp_layer_start 2 --block_mlp_layer_end 30", "layers 0 to 2"),
        ("--block_attention_layer_start 3 --block_attention_layer_end 3", "out of range"),
        ("--block_wise --channel_wise", "exclude each other"),
        ("--layer_wise --layer 3", "give fewer"),
        ("--layer_wise --iterative_steps 2", "exclude each other"),
        ("--layer 2", "--layer needs --layer_wise"),
        ("--channel_wise --block_mlp_layer_start 1", "layer ranges are for heads and neurons"),
        ("--max_seq_len 128", "at most 64"),
        ("--seed -1", "out of range"),
        ("--num_examples 0", "1 or more"),
        ("--device cuda:99", "no CUDA device" if not torch.cuda.is_available() else "cuda"),
        ("--device toaster", "is not valid: give cpu"),
        ("--save_ckpt_log_name ../up", "plain folder name"),
        ("--prunning_ratio 0.5", "did you mean --pruning_ratio"),
        ("--output_root /proc/nowhere", "cannot write"),
        ("--dtype int4", "choose from"),
        ("--target_params 9T", "give less"),
        ("--target_params 9X", "use a fraction"),
        ("--target_params 0.01", "cannot be reached"),
        ("--target_params 0.9 --iterative_steps 2", "solved in one step"),
        ("--target_params 0.9 --target_macs 0.9", "exclude each other"),
        ("--target_memory 3parsec", "use a fraction"),
        ("--floor 1", "out of range"),
        ("--normalize mean", "--normalize needs one of --global_pruning"),
        ("--target_macs 0.01 --budget_tokens 16", "cannot be reached"),
        ("--compensate wishes", "choose from none, least_squares"),
        ("--compensate least_squares --num_examples 10", "--num_examples of at least 32"),
        ("--preset quick", "choose from best, fast, paper"),
        ("--compensate least_squares --channel_wise --num_examples 40", "hidden states of one size"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(folder, capsys, extra, message):
    assert hf_prune(folder, *extra.split()) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error, error
    assert not (folder / "runs").exists() or list((folder / "runs").iterdir()) == []


def test_scripts_and_module_are_the_same_door(folder):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "hf_prune.py"), *flags(folder, "--pruning_ratio", "2")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    assert done.returncode == 2 and done.stderr.strip().splitlines()[-1].startswith("error: --pruning_ratio 2.0")
    done = subprocess.run(
        [sys.executable, "-m", "llm_pruner", "--help"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0 and all(c in done.stdout for c in ("prune", "inspect", "evaluate", "demo"))


def test_evaluate_perplexity(folder, capsys):
    out = folder / "p.json"
    arguments = ["--model", str(folder / "model"), "--dataset", str(folder / "text.txt"), "--seq_len", "16"]
    windows = ["--max_windows", "4", "--output", str(out)]
    assert script("evaluate/perplexity.py", *arguments, *windows) == 0
    record = json.loads(out.read_text())
    assert (
        record["windows"] == 4 and record["tokens"] == 60 and f"{record['perplexity']:.4f}" in capsys.readouterr().out
    )
    assert script("evaluate/perplexity.py", *arguments[:-1], "4000") == 2
    assert "less than one window" in capsys.readouterr().err
    command = [sys.executable, str(ROOT / "evaluate" / "perplexity.py"), *arguments, "--max_windows", "4"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0 and f"{record['perplexity']:.4f}" in done.stdout


def test_inspect(folder, capsys):
    assert main(["inspect", str(folder / "model")]) == 0
    out = capsys.readouterr().out
    assert "neurons" in out and "combined with a" in out
    assert main(["inspect", str(folder / "model" / "config.json"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {u["kind"] for u in found["units"]} >= {"heads", "neurons", "hidden", "layers", "vocabulary"}
    assert all(u["frozen"] for u in found["frozen"])
    assert main(["inspect", str(folder / "model"), "--verify"]) == 0
    assert "units pass" in capsys.readouterr().out
    assert main(["inspect", "/nowhere/at/all"]) == 2
    assert main(["inspekt"]) == 2 and "did you mean inspect" in capsys.readouterr().err


def test_evaluate_is_no_package():
    """lm-eval imports a package of this name from site-packages; the folder of scripts must not be in its way."""
    code = "import evaluate; print(evaluate.__file__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "site-packages" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (
            RuntimeError("can't allocate memory: you tried to allocate 8589934592 bytes."),
            "8.00 GiB",
        ),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has"), "on the GPU by 2.50 GiB"),
        (MemoryError(), "out of memory:"),
    ],
)
def test_out_of_memory_says_how_much_and_what_to_do(monkeypatch, capsys, error, asked):
    def run_out(_):
        raise error

    monkeypatch.setattr("llm_pruner.pruning.run.run_prune", run_out)
    assert run_command(replace(SCRIPTS["hf_prune.py"]), [], "hf_prune.py") == 2
    line = capsys.readouterr().err.strip()
    assert line.startswith("error: out of memory") and asked in line and "--stream" in line


@pytest.mark.parametrize(
    ("name", "advice"), [("recover", "lower --micro_batch_size"), ("evaluate", "--dtype bfloat16"), ("apply", "more")]
)
def test_out_of_memory_names_flags_of_the_command(name, advice):
    message = _explain_out_of_memory(COMMANDS[name], "")
    assert advice in message and "--stream" not in message
