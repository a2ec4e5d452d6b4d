"""Flags and folders that cannot work are refused before training, in one line."""

import os
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers.recovery import arguments

import llm_pruner as lp
from llm_pruner.cli import main
from llm_pruner.files import read_json
from llm_pruner.recovery.rows import read_rows
from llm_pruner.recovery.run import recover, start_wandb
from llm_pruner.recovery.settings import OutputSettings, resolve_settings
from llm_pruner.recovery.training_arguments import training_arguments


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prune_model": "/nowhere"}, "there is no model folder /nowhere"),
        ({"prune_model": "nobody/nothing"}, "there is no model nobody/nothing"),
        ({"prune_model": None}, "--model is missing"),
        ({"data_path": "/nowhere.json"}, "there is no data file"),
        ({"data_path": "/tmp"}, "/tmp is a folder: give one of its .json"),
        ({"lora_r": 33}, "--lora_r 33 is more than model.layers.0.self_attn.q_proj"),
        ({"lora_target_modules": "c_attn"}, "has no linear layer c_attn; it has down_proj"),
        ({"prompt_template_name": "vicuna"}, "no prompt template 'vicuna'"),
        ({"method": "qlora"}, "choose from lora, dora, full, distill"),
        ({"batch_size": 5}, "--batch_size 5 is not valid: give a multiple of --micro_batch_size 2"),
        ({"val_set_size": 60}, "leaves nothing of 60"),
        ({"val_set_size": 60, "streaming": True, "max_steps": 2}, "leaves nothing of 60"),
        ({"learning_rate": 0.0}, "--learning_rate 0.0 is out of range"),
        ({"teacher": "/nowhere"}, "there is no model folder"),
        ({"resume_from_checkpoint": "/nowhere"}, "is not a checkpoint"),
        ({"report_to": "wandb"}, "pip install wandb"),
        ({"cutoff_len": 500}, "the model reads at most 128"),
        ({"streaming": True, "max_steps": 0}, "--streaming needs --max_steps"),
        ({"objective": "gpt"}, "--objective 'gpt' is not valid: choose from causal, ul2"),
        ({"lr_scheduler_type": "cosin"}, "--lr_scheduler_type 'cosin' is not valid: choose from linear"),
        ({"device": "meta"}, "--device .meta. holds no weights"),
        ({"device": "gpu"}, "--device .gpu. is not valid"),
        ({"teacher": "auto", "teacher_device": "gpu"}, "--teacher_device .gpu. is not valid"),
        ({"packing": True, "group_by_length": True}, "--packing and --group_by_length exclude each other"),
        ({"teacher_cache": "c"}, "--teacher_cache needs --teacher or --method distill"),
        ({"teacher": "auto", "teacher_cache": "c", "distill_hidden": 0.1}, "--teacher_cache and --distill_hidden"),
        ({"method": "full", "merge": True}, "--merge is not valid with --method full"),
        ({"save_steps": 3}, "--save_steps 3 is not valid: give a multiple of --eval_steps 8"),
        ({"lora_dropout": 1.0}, "--lora_dropout 1.0 is out of range"),
        ({"distill_weight": 1.5}, "--distill_weight 1.5 is out of range"),
        ({"seed": -1}, "--seed -1 is out of range"),
        ({"optim": "adamm"}, "--optim 'adamm' is not valid: choose from adamw"),
        ({"optim": "paged_adamw_32bit"}, "pip install bitsandbytes"),
        ({"optim": "galore_adamw"}, "--optim galore_adamw cannot be used: "),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "--lr_scheduler_type 'warmup_stable_decay' is not valid"),
        ({"lr_scheduler_type": "greedy", "val_set_size": 0}, "greedy follows the validation loss"),
        ({"streaming": True, "group_by_length": True}, "--streaming and --group_by_length exclude each other"),
        ({"distill_hidden": 0.5}, "--distill_hidden needs --teacher or --method distill"),
        ({"teacher_device": "cpu"}, "--teacher_device needs --teacher, --method distill or --self_data"),
        ({"method": "distill", "teacher_top": 9}, "--teacher_top needs --teacher_cache"),
        ({"max_windows": 4}, "--max_windows needs --extra_val_dataset"),
        ({"wandb_project": "p", "report_to": "tensorboard"}, "--wandb_project and --report_to tensorboard exclude"),
    ],
)
def test_bad_input_is_one_clear_line(home, tmp_path, changes, message):
    if changes.get("prune_model") == "base":
        changes = {"prune_model": str(home / "base")}
    with pytest.raises(lp.PrunerError, match=message):
        recover(arguments(home, tmp_path / "out", **changes))
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_examples_are_as_long_as_the_model_reads(home, tmp_path):
    """By default; a length that is asked for is had or refused."""
    recover(arguments(home, tmp_path / "out", cutoff_len=None, max_steps=2))
    assert read_json(tmp_path / "out" / "recovery.json")["steps"] == 2


@pytest.mark.parametrize("schedule", ("reduce_lr_on_plateau", "greedy", "polynomial"))
def test_schedules_need_no_checkpoint(home, tmp_path, schedule):
    recover(arguments(home, tmp_path / "out", lr_scheduler_type=schedule, max_steps=2, eval_steps=1, save_steps=4))
    assert read_json(tmp_path / "out" / "recovery.json")["steps"] == 2


def test_folders_of_other_runs_are_left_alone(home, tmp_path):
    """The model itself, another model, and files beside the adapter."""
    shutil.copytree(home / "pruned", tmp_path / "pruned")
    before = {p.name: p.read_bytes() for p in (tmp_path / "pruned").iterdir()}
    with pytest.raises(lp.PrunerError, match="is the model to be trained"):
        recover(arguments(home, tmp_path / "pruned", prune_model=str(tmp_path / "pruned")))
    with pytest.raises(lp.PrunerError, match="holds a model that another command wrote"):
        recover(arguments(home, tmp_path / "pruned"))
    assert {p.name: p.read_bytes() for p in (tmp_path / "pruned").iterdir()} == before
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tsconfig.json").write_text("{}")
    recover(arguments(home, tmp_path / "out", max_steps=2))
    assert (tmp_path / "out" / "tsconfig.json").read_text() == "{}"


def test_a_wrong_template_is_refused_with_and_without_network(home, tmp_path, monkeypatch):
    """Only a default data set that cannot be reached is replaced by the embedded text."""
    for reach in (True, False):

        def read(source, streaming=False, reach=reach):
            if source == "yahma/alpaca-cleaned" and not reach:
                raise lp.PrunerError("no network")
            return read_rows(str(home / "data.jsonl"), streaming)

        monkeypatch.setattr("llm_pruner.recovery.datasets.read_rows", read)
        with pytest.raises(lp.PrunerError, match="no prompt template"):
            recover(arguments(home, tmp_path / "out", data_path=None, prompt_template_name="alpaka", max_steps=2))


def test_the_command_reports_errors_in_one_line(tmp_path, capsys):
    code = main(["recover", "--prune_model", str(tmp_path)])
    error = capsys.readouterr().err
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1


# --- Settings -------------------------------------------------------------------------------------------------------


def test_flags_resolve_twice_to_the_same_settings(home, tmp_path):
    flags = arguments(home, tmp_path / "out", method="distill", device="auto", wandb_project=None)
    before = vars(flags).copy()
    first, second = resolve_settings(flags), resolve_settings(flags)
    assert first == second and vars(flags) == before
    assert first.teacher is not None and first.teacher.name is None and first.adapter is None


@pytest.mark.parametrize(("flag", "default"), (("auto", "mps"), ("cpu", "cpu"), ("mps", "mps")))
def test_the_teacher_is_where_the_model_is_unless_told(home, tmp_path, monkeypatch, flag, default):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    settings = resolve_settings(arguments(home, tmp_path, device=flag, teacher="auto"))
    assert (settings.model.device, settings.teacher.device) == (default, default)
    assert settings.model.compute is settings.model.weights is torch.float32
    settings = resolve_settings(arguments(home, tmp_path, device=flag, teacher="auto", teacher_device="cpu"))
    assert (settings.model.device, settings.teacher.device) == (default, "cpu")


def test_a_second_gpu_is_chosen_by_the_environment(home, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(lp.PrunerError, match=r"CUDA_VISIBLE_DEVICES=1 and give --device cuda$"):
        resolve_settings(arguments(home, tmp_path, device="cuda:1"))


def test_frozen_weights_are_narrow_on_a_gpu(home, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    dtypes = {
        method: resolve_settings(arguments(home, tmp_path, device="cuda", dtype="auto", method=method)).model
        for method in ("lora", "full")
    }
    assert {model.compute for model in dtypes.values()} == {torch.bfloat16}
    assert (dtypes["lora"].weights, dtypes["full"].weights) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("multiplies", (True, False))
def test_a_cpu_computes_in_bfloat16_where_it_multiplies_that(home, tmp_path, monkeypatch, multiplies):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: multiplies)
    settings = [resolve_settings(arguments(home, tmp_path, dtype=dtype)) for dtype in ("auto", "float32")]
    assert [one.model.compute for one in settings] == [torch.bfloat16 if multiplies else torch.float32, torch.float32]
    assert {one.model.weights for one in settings} == {torch.float32}
    assert training_arguments(settings[0], 8, ()).bf16 is multiplies


def test_the_batch_is_split_over_processes(home, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert resolve_settings(arguments(home, tmp_path, batch_size=8)).training.accumulation_steps == 2
    with pytest.raises(lp.PrunerError, match="times 2 processes"):
        resolve_settings(arguments(home, tmp_path, batch_size=6))


def test_the_wandb_project_is_set_without_the_environment(home, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **options: calls.append(options)))
    environment = dict(os.environ)
    start_wandb(OutputSettings(folder=tmp_path / "out", wandb_project="pruned"))
    start_wandb(OutputSettings(folder=tmp_path / "out"))
    assert calls == [{"project": "pruned", "name": "out"}] and dict(os.environ) == environment
