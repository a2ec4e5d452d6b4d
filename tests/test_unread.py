"""Tensors that a model's class does not read are named, layers of them no longer counted, quantized weights refused."""

import json

import pytest
import torch
from helpers.models import build
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, Glm4MoeConfig, Glm4MoeForCausalLM, LlavaConfig

import llm_pruner as lp
from llm_pruner.checkpoint.apply_files import apply_to_files
from llm_pruner.checkpoint.unread import forget_unread, unread_tensors
from llm_pruner.cli import main

QUICK = ["--pruner_type", "l2", "--compensate", "none", "--eval_datasets", "", "--device", "cpu"]


def add_tensors(folder, tensors):
    file = folder / "model.safetensors"
    save_file(load_file(file) | tensors, file, metadata={"format": "pt"})


@pytest.fixture
def with_tower(home, tokenizer, tmp_path):
    """A checkpoint whose files hold tensors that its class does not read."""
    lp.save(build("llama", vocab_size=len(tokenizer)), tokenizer, tmp_path / "base")
    add_tensors(tmp_path / "base", {f"visual.{i}.weight": torch.ones(2, 2) for i in range(4)})
    return tmp_path / "base"


def test_unread_tensors_are_told_by_load(with_tower, caplog):
    with caplog.at_level("WARNING", "llm_pruner"):
        model, _ = lp.load(str(with_tower))
    assert unread_tensors(model) == [f"visual.{i}.weight" for i in range(4)]
    assert "4 tensors of its files are not read by LlamaForCausalLM and left out" in caplog.text
    assert "visual.0.weight, visual.1.weight, visual.2.weight, ..." in caplog.text
    caplog.clear()
    assert unread_tensors(lp.load("smollm2-135m")[0]) == [] and not caplog.text


def test_log_metrics_plan_and_card_name_them(with_tower, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["prune", str(with_tower), str(out), *QUICK, "--pruning_ratio", "0.25"]) == 0
    assert "4 tensors of its files are not read" in capsys.readouterr().err
    for record in (json.loads((out / "metrics.json").read_text()),):
        assert record["unread_tensors"] == [f"visual.{i}.weight" for i in range(4)]
    assert "**Left out**: 4 tensors" in (out / "README.md").read_text()
    assert "visual" not in " ".join(load_file(out / "model.safetensors"))
    applied = tmp_path / "applied"
    assert main(["apply", str(out / "pruning_plan.json"), str(with_tower), str(applied)]) == 0
    assert "4 tensors of its files are not read" in capsys.readouterr().err
    assert "**Left out**: 4 tensors" in (applied / "README.md").read_text()


@pytest.fixture
def mixture(tokenizer, tmp_path):
    """A mixture of experts with a layer for multi-token prediction, which transformers does not read."""
    config = Glm4MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        num_nextn_predict_layers=1,
        pad_token_id=0,
    )
    lp.save(Glm4MoeForCausalLM(config).eval(), tokenizer, tmp_path / "mixture")
    add_tensors(tmp_path / "mixture", {"model.layers.2.eh_proj.weight": torch.ones(32, 64)})
    return tmp_path / "mixture"


@pytest.mark.parametrize("command", ["prune", "apply"])
def test_layers_that_are_left_out_are_no_longer_counted(command, mixture, tmp_path, capsys):
    out = tmp_path / "out"
    argv = ["prune", str(mixture), str(out), *QUICK, "--kinds", "experts", "--pruning_ratio", "0.25"]
    assert main(argv) == 0
    if command == "apply":
        out = tmp_path / "applied"
        capsys.readouterr()
        assert main(["apply", str(tmp_path / "out" / "pruning_plan.json"), str(mixture), str(out)]) == 0
    assert "num_nextn_predict_layers is set to 0" in capsys.readouterr().err
    assert AutoConfig.from_pretrained(out).num_nextn_predict_layers == 0
    assert not any("eh_proj" in name for name in load_file(out / "model.safetensors"))


def quantize(folder, how):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    if how == "file":
        (folder / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    elif how == "dtype":
        name = next(name for name in tensors if name.endswith("up_proj.weight"))
        save_file(tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, file, metadata={"format": "pt"})
    elif how == "config":
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
        (folder / "config.json").write_text(json.dumps(config))
    else:
        add_tensors(folder, {f"model.layers.0.mlp.up_proj.{how}": torch.ones(1)})


@pytest.mark.parametrize("how", ["file", "dtype", "config", "weight_scale", "weight_scale_inv", "qweight", "SCB"])
def test_quantized_weights_are_refused_before_any_work(how, with_tower, home, tmp_path, capsys):
    quantize(with_tower, how)
    assert main(["prune", str(with_tower), str(tmp_path / "out"), *QUICK]) == 2
    error = capsys.readouterr().err
    assert "is quantized (" in error and "load the unquantized checkpoint" in error and error.count("\n") == 1
    with pytest.raises(lp.PrunerError, match="is quantized"):
        lp.load(str(with_tower))
    plan = lp.PruningPlan.load(home / "pruned" / "pruning_plan.json")
    with pytest.raises(lp.PrunerError, match="is quantized"):
        apply_to_files(plan, str(with_tower), tmp_path / "applied")
    assert not (tmp_path / "out").exists() and not (tmp_path / "applied").exists()


def test_counts_of_an_inner_config_are_set_to_0():
    """A model that reads images counts the layers of its language in the config of that."""
    config = LlavaConfig(text_config=Glm4MoeConfig(num_nextn_predict_layers=1))
    assert config.text_config.num_mtp_layers == 1
    forget_unread(config, "model", ["model.language_model.layers.46.eh_proj.weight"])
    assert config.text_config.num_mtp_layers == 0
