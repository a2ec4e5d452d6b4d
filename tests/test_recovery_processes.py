"""Several processes train what one trains, with whole weights on each or parts of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from helpers.recovery import arguments, read_losses, read_record, write_pruned
from safetensors.torch import load_file

from llm_pruner.recovery.run import recover

ROOT = Path(__file__).parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def run_two(script, arguments, environment=None):
    """Run a script with recovery arguments on two processes."""
    flags = []
    for name, value in vars(arguments).items():
        text = ",".join(value) if isinstance(value, list) else value
        flags += [] if text is None or text == "" else [f"--{name}", str(text)]
    done = subprocess.run(
        [*TORCHRUN, str(script), *flags], capture_output=True, text=True, env=os.environ | (environment or {})
    )
    assert done.returncode == 0, done.stderr[-2000:]


def launch_environment(name):
    """Return the environment that ``accelerate launch`` gives its processes with a configuration of the repository."""
    file = ROOT / "examples" / "launch" / f"{name}.yaml"
    arguments = launch_command_parser().parse_args(["--config_file", str(file), "post_training.py"])
    arguments, defaults, _ = _validate_launch_command(arguments)
    arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)  # as the command does next
    return prepare_deepspeed_cmd_env(arguments)[1] if arguments.use_deepspeed else prepare_multi_gpu_env(arguments)


def test_accelerate_reads_the_launch_configurations(monkeypatch):
    monkeypatch.setattr("accelerate.commands.launch.is_deepspeed_available", lambda: True)
    environments = {name: launch_environment(name) for name in ("one_node", "fsdp2", "deepspeed_zero2")}
    assert {e["ACCELERATE_MIXED_PRECISION"] for e in environments.values()} == {"bf16"}
    assert environments["fsdp2"]["ACCELERATE_USE_FSDP"] == environments["deepspeed_zero2"]["ACCELERATE_USE_DEEPSPEED"]
    assert environments["deepspeed_zero2"]["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "2"
    assert "ACCELERATE_USE_FSDP" not in environments["one_node"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "rank"), (("llama", 4), ("mamba", 1)))
def test_two_processes_learn_as_one_does(home, tmp_path, tokenizer, name, rank):
    options = {"batch_size": 8, "max_steps": 5, "lora_r": rank, "lora_dropout": 0.0, "learning_rate": 3e-4}
    options |= {"eval_steps": 5, "save_steps": 5}
    if name == "mamba":  # its forward pass never calls some of its layers
        write_pruned(name, tokenizer, tmp_path / "pruned", "channels")
        options["prune_model"] = str(tmp_path / "pruned")
    recover(arguments(home, tmp_path / "one", **options))
    run_two(ROOT / "post_training.py", arguments(home, tmp_path / "two", **options))
    one, two = (dict(read_losses(tmp_path / name)) for name in ("one", "two"))
    assert two == pytest.approx(one, abs=1e-3)
    one, two = (read_record(tmp_path / name)["losses"]["validation"] for name in ("one", "two"))
    assert two == pytest.approx(one, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("method", ("full", "lora"))
def test_fsdp_writes_whole_weights(home, tmp_path, method):
    """With FSDP2 every process holds a part of each weight; the result is that of one process."""
    options = {"method": method, "lora_dropout": 0.0, "max_steps": 4, "merge": method == "lora", "cutoff_len": 32}
    options |= {"no_instruction": True, "data_path": "python-docs", "eval_steps": 2, "save_steps": 2}
    recover(arguments(home, tmp_path / "one", **options))
    fsdp = {k: v for k, v in launch_environment("fsdp2").items() if k == "ACCELERATE_USE_FSDP" or k.startswith("FSDP_")}
    assert fsdp["FSDP_VERSION"] == "2" and fsdp["FSDP_STATE_DICT_TYPE"] == "FULL_STATE_DICT"
    fsdp["OMP_NUM_THREADS"] = "1"
    run_two(ROOT / "tests" / "helpers" / "two_processes.py", arguments(home, tmp_path / "two", **options), fsdp)
    one, two = (dict(read_losses(tmp_path / name)) for name in ("one", "two"))
    assert two == pytest.approx(one, abs=1e-3)
    for name in ("model",) if method == "full" else ("adapter_model", "merged/model"):
        one, two = (load_file(tmp_path / n / f"{name}.safetensors") for n in ("one", "two"))
        assert one.keys() == two.keys()
        assert all(torch.allclose(one[key], two[key], atol=1e-3) for key in one)
