"""Quantized checkpoints: read to the bit, sliced without touching a value, or written in 16 bits."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.quantized import FORMATS, quantized, unquantized
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config

import llm_pruner as lp
from llm_pruner.checkpoint import locate as locating
from llm_pruner.checkpoint.apply_files import apply_to_files
from llm_pruner.checkpoint.integrity import check
from llm_pruner.checkpoint.locate import locate
from llm_pruner.checkpoint.quantized.awq import awq_weights
from llm_pruner.checkpoint.quantized.config import quantization_after
from llm_pruner.checkpoint.quantized.weights import InsideBlock, Part, Weight, part_positions
from llm_pruner.checkpoint.stored import weights_in
from llm_pruner.cli import main
from llm_pruner.graph.units import Unit
from llm_pruner.pruning.quantized import block_size, in_blocks
from llm_pruner.pruning.refit_record import RefitRecord
from llm_pruner.pruning.settings import CalibrationSettings

OF_MIXTURES = [("qwen3_moe", how) for how in FORMATS if how != "mxfp4"] + [("gpt_oss", "mxfp4")]
CASES = [("qwen3", "fp8"), ("deepseek_v3", "fp8"), *OF_MIXTURES]
STOCK = [("qwen3", "fp8"), ("qwen3_moe", "fp8"), ("qwen3_moe", "fp8_tensor"), ("gpt_oss", "mxfp4")]
# Values that share a scale, or a packed number, along the neurons of an MLP.
BLOCKS = {"fp8": 16, "ct_fp8_block": 16, "ct_int4": 32, "ct_int4_zero": 16, "ct_nvfp4": 16, "mxfp4": 32}
BLOCKS |= {"gptq": 32, "awq": 32, "ct_mxfp4": 32}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return quantized checkpoints, and the same values unquantized, each made once."""
    made: dict[tuple[str, str], tuple[Path, Path]] = {}

    def make(name, how):
        if (name, how) not in made:
            root = tmp_path_factory.mktemp(f"{name}-{how}")
            unquantized(name, root / "original")
            values = quantized(root / "original", root / "quantized", how)
            (root / "values").mkdir()
            for file in (root / "original").glob("*.json"):
                shutil.copyfile(file, root / "values" / file.name)
            values = {key: value.contiguous() for key, value in values.items()}
            save_file(values, root / "values" / "model.safetensors", metadata={"format": "pt"})
            made[name, how] = root / "quantized", root / "values"
        return made[name, how]

    return make


def stored(folder):
    return load_file(folder / "model.safetensors")


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def stock(folder):
    """Load with transformers alone, dequantized; no key may be missing or unexpected."""
    method = json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"]
    config = FineGrainedFP8Config(dequantize=True) if method == "fp8" else Mxfp4Config(dequantize=True)
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=config, output_loading_info=True
    )
    assert not any(report.values()), report
    return model.eval()


@pytest.mark.parametrize(("name", "how"), CASES)
def test_values_are_those_of_the_definition(name, how, folders):
    folder, values = folders(name, how)
    model, _ = lp.load(str(folder), "float32")
    expected, _ = lp.load(str(values), "float32")
    assert same(model, expected)
    assert not hasattr(model.config, "quantization_config")
    assert lp.load(str(folder))[0].dtype == torch.bfloat16


@pytest.mark.parametrize(("name", "how"), STOCK)
def test_values_are_those_of_transformers(name, how, folders):
    folder, _ = folders(name, how)
    assert same(stock(folder), lp.load(str(folder), "float32")[0])


@pytest.mark.parametrize(("name", "how"), [("qwen3_moe", "ct_int4"), ("gpt_oss", "mxfp4"), ("deepseek_v3", "fp8")])
def test_offloaded_weights_are_filled_in_their_files(name, how, folders, tmp_path):
    folder, _ = folders(name, how)
    model, _ = lp.load(str(folder))
    offloaded, _ = lp.load(str(folder), offload_folder=tmp_path)
    assert same(model, offloaded)
    assert all(parameter.untyped_storage().filename for parameter in offloaded.parameters())
    read = dict(weights_in(str(folder)))
    assert read.keys() == dict(model.named_parameters()).keys() | {n for n in read if "bias" in n}
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in read.items())


def plan_of(folder, kind, ratio=0.5, blocks=1):
    model, _ = lp.load(str(folder), "float32")
    graph = lp.trace(model).copy()
    for unit in graph.of_kind(kind):
        unit.block, unit.multiple = blocks, max(blocks, unit.multiple)
    scores = lp.score(model, graph, criterion="random", kinds=[kind])
    return model, lp.select(graph, scores, ratio, kinds=[kind])


def slices():
    """Cases of formats and kinds; those that differ little from another are slow."""
    quick = {(name, how, "experts") for name, how in CASES if how in ("fp8", "mxfp4", "ct_int4_zero")}
    quick |= {("qwen3", "fp8", "layers"), ("gpt_oss", "mxfp4", "layers"), ("gpt_oss", "mxfp4", "neurons")}
    quick |= {("qwen3_moe", how, "neurons") for how in ("ct_fp8_block", "ct_int4_zero", "ct_nvfp4", "gptq", "awq")}
    for name, how in CASES:
        for kind in ("experts", "layers", "neurons"):
            if (name, kind) != ("qwen3", "experts") and (how, kind) != ("gptq_ordered", "neurons"):
                marks = [] if (name, how, kind) in quick else [pytest.mark.slow]
                yield pytest.param(name, how, kind, marks=marks)


@pytest.mark.parametrize(("name", "how", "kind"), slices())
def test_slices_are_the_pruned_model(name, how, kind, folders, tmp_path):
    """The written files, read again, are the dequantized model pruned in memory; transformers reads all of them."""
    folder, _ = folders(name, how)
    model, plan = plan_of(folder, kind, blocks=BLOCKS.get(how, 1) if kind == "neurons" else 1)
    apply_to_files(plan, str(folder), tmp_path / "out")
    pruned, _ = lp.load(str(tmp_path / "out"), "float32")
    assert same(pruned, lp.apply(model, plan))
    check(tmp_path / "out")
    before, after = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "out"))
    kept, still = before["quantization_config"], after["quantization_config"]
    assert kept.keys() == still.keys() and before["dtype"] == after["dtype"] == "bfloat16"
    old, new = stored(folder), stored(tmp_path / "out")
    assert {t.dtype for t in old.values()} == {t.dtype for t in new.values()}
    if (name, how) in STOCK and name != "deepseek_v3":
        assert same(stock(tmp_path / "out"), pruned)


def test_experts_are_renumbered_and_not_changed(folders, tmp_path):
    folder, _ = folders("qwen3_moe", "ct_int4_zero")
    _, plan = plan_of(folder, "experts")
    apply_to_files(plan, str(folder), tmp_path / "out")
    old, new = stored(folder), stored(tmp_path / "out")
    for layer in range(3):
        kept = plan.units[f"model.layers.{layer}.mlp.experts"].kept.tolist()
        for number, expert in enumerate(kept):
            before, after = f"model.layers.{layer}.mlp.experts.{expert}.", f"model.layers.{layer}.mlp.experts.{number}."
            parts = {name.removeprefix(before) for name in old if name.startswith(before)}
            assert len(parts) == 12 and parts == {n.removeprefix(after) for n in new if n.startswith(after)}
            assert all(torch.equal(old[before + part], new[after + part]) for part in parts)
        assert torch.equal(
            new[f"model.layers.{layer}.mlp.gate.weight"], old[f"model.layers.{layer}.mlp.gate.weight"][kept]
        )
    assert not any(".experts.4." in name for name in new)


def test_neurons_go_with_their_scales(folders, tmp_path):
    folder, _ = folders("qwen3", "fp8")
    _, plan = plan_of(folder, "neurons", blocks=16)
    apply_to_files(plan, str(folder), tmp_path / "out")
    old, new = stored(folder), stored(tmp_path / "out")
    for name, choice in plan.units.items():
        blocks = choice.kept[::16] // 16
        assert torch.equal(choice.kept, (blocks[:, None] * 16 + torch.arange(16)).flatten())
        down, up = (name.replace("neurons", f"{one}_proj.weight") for one in ("down", "up"))
        assert torch.equal(new[up].view(torch.uint8), old[up].view(torch.uint8)[choice.kept])
        assert torch.equal(new[up + "_scale_inv"], old[up + "_scale_inv"][blocks])
        assert torch.equal(new[down].view(torch.uint8), old[down].view(torch.uint8)[:, choice.kept])
        assert torch.equal(new[down + "_scale_inv"], old[down + "_scale_inv"][:, blocks])


def test_lists_of_modules_follow_layers(folders, tmp_path):
    folder, _ = folders("qwen3_moe", "ct_int4")
    model, _ = lp.load(str(folder), "float32")
    graph = lp.trace(model)
    plan = lp.select(
        graph, lp.Scores({"model.layers.layers": torch.tensor([2.0, 1, 3]).double()}), 0.34, kinds=["layers"]
    )
    apply_to_files(plan, str(folder), tmp_path / "out")
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert ignored == ["lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]
    renamed = {"model.layers.0.a": None, "model.layers.1.a": "model.layers.0.a", "model.layers.2.a": "model.layers.1.a"}
    config = {"groups": {"g": {"targets": ["Linear", r"re:.*layers\.[02]\.a"]}}, "ignore": ["re:.*gate", "layers.1.a"]}
    assert quantization_after(config, renamed) == {
        "groups": {"g": {"targets": ["Linear", "model.layers.1.a"]}},
        "ignore": ["re:.*gate", "model.layers.0.a"],
    }
    config = {"dynamic": {r"+:.*\.0\.a": {"bits": 8}, r"-:.*\.1\.a": {}, "-:.*norm": {}}}
    assert quantization_after(config, renamed)["dynamic"] == {r"-:model\.layers\.0\.a$": {}, "-:.*norm": {}}


@pytest.mark.parametrize(("name", "how"), [("qwen3", "fp8"), ("qwen3_moe", "ct_int4"), ("gpt_oss", "mxfp4")])
def test_cuts_inside_blocks_are_refused_or_written_in_16_bits(name, how, folders, tmp_path, capsys):
    folder, _ = folders(name, how)
    model, plan = plan_of(folder, "neurons", 0.25)
    plan.save(tmp_path / "plan.json")
    argv = ["apply", str(tmp_path / "plan.json"), str(folder), str(tmp_path / "out")]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert "and the plan keeps some of them only: remove whole experts, layers or tokens, or add --dequantize" in error
    assert not (tmp_path / "out").exists()
    assert main([*argv, "--dequantize"]) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert same(written, lp.apply(model, plan).to(torch.bfloat16))


def test_inputs_in_the_order_of_activations_stay(folders, tmp_path):
    folder, _ = folders("qwen3_moe", "gptq_ordered")
    _, plan = plan_of(folder, "neurons", blocks=32)
    with pytest.raises(lp.PrunerError, match=r"g_idx holds one number for 64 values.*--dequantize"):
        apply_to_files(plan, str(folder), tmp_path / "out")


def test_hidden_channels_go_in_blocks(folders, tmp_path):
    folder, _ = folders("qwen3", "fp8")
    model, plan = plan_of(folder, "hidden", blocks=16)
    apply_to_files(plan, str(folder), tmp_path / "out")
    assert same(lp.load(str(tmp_path / "out"), "float32")[0], lp.apply(model, plan))


@pytest.fixture
def with_tokenizer(tokenizer, tmp_path):
    unquantized("qwen3_moe", tmp_path / "original", vocab_size=len(tokenizer))
    quantized(tmp_path / "original", tmp_path / "model", "fp8")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


PRUNE = ["--pruner_type", "l2", "--eval_datasets", "", "--device", "cpu"]


def test_the_command_slices(home, with_tokenizer, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["prune", str(with_tokenizer), str(out), *PRUNE, "--kinds", "neurons", "--pruning_ratio", "0.4"]) == 0
    told = capsys.readouterr().err
    assert "is quantized (fp8): its weights are dequantized to float32" in told
    assert "no refit:" in told and "stays quantized; --dequantize refits it and writes 16 bits" in told
    assert "quantized weights: neurons keep multiples of 16 indices, since these share scales" in told
    plan = lp.PruningPlan.load(out / "pruning_plan.json", verify=True)
    assert "refit" not in plan.settings and "refit" not in json.loads((out / "metrics.json").read_text())
    assert {len(choice.kept) for choice in plan.units.values()} == {48}
    pruned, tokenizer = lp.load(str(out), "float32", verify=True)
    assert tokenizer is not None and stored(out)["model.layers.1.mlp.experts.7.up_proj.weight"].dtype.itemsize == 1
    assert same(pruned, lp.apply(lp.load(str(with_tokenizer), "float32")[0], plan))


@pytest.mark.parametrize("flags", [["--stream"], ["--dequantize"], ["--dequantize", "--stream"]])
def test_the_command_streams_and_dequantizes(flags, home, with_tokenizer, tmp_path):
    argv = ["prune", str(with_tokenizer), str(tmp_path / "out"), *PRUNE, *flags, "--kinds", "experts"]
    assert main([*argv, "--pruning_ratio", "0.25", "--compensate", "none"]) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert ("quantization_config" in config) == ("--dequantize" not in flags)
    plan = lp.PruningPlan.load(tmp_path / "out" / "pruning_plan.json")
    expected = lp.apply(lp.load(str(with_tokenizer))[0], plan)
    assert expected.config.num_experts == 6
    assert same(lp.load(str(tmp_path / "out"))[0], expected) and expected.dtype == torch.bfloat16


def test_a_checkpoint_of_the_hub_is_its_snapshot(home, with_tokenizer, tmp_path):
    """The cache is one that a download has filled; the hub cannot be reached."""
    snapshot = tmp_path / "hub" / "models--org--quantized" / "snapshots" / "0123abcd"
    shutil.copytree(with_tokenizer, snapshot)
    (snapshot / "README.md").write_text("---\nlicense: mit\n---\n")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(snapshot.name)
    code = "import sys; from llm_pruner.cli import main; sys.exit(main(sys.argv[1:]))"
    argv = ["prune", "org/quantized", str(tmp_path / "out"), *PRUNE, "--kinds", "experts", "--pruning_ratio", "0.25"]
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    run = partial(subprocess.run, env=environment, capture_output=True, text=True)
    done = run([sys.executable, "-c", code, *argv])
    assert done.returncode == 0, done.stderr
    assert "org/quantized is quantized (fp8): its weights are dequantized" in done.stderr
    (folder := tmp_path / "local").mkdir()
    assert main(["prune", str(with_tokenizer), str(folder / "out"), *argv[3:]]) == 0
    theirs, ours = stored(folder / "out"), stored(tmp_path / "out")
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name].view(torch.uint8), ours[name].view(torch.uint8)) for name in ours)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model: org/quantized" in card and "license: mit" in card


def test_a_checkpoint_of_the_hub_is_downloaded(with_tokenizer, tmp_path, monkeypatch):
    config = with_tokenizer / "config.json"
    cached = tmp_path / "cached"
    cached.mkdir()
    shutil.copyfile(config, cached / "config.json")
    asked = []

    def download(name, **options):
        asked.append((name, options["revision"]))
        shutil.copytree(with_tokenizer, cached, dirs_exist_ok=True)

    monkeypatch.setattr("llm_pruner.hub.try_to_load_from_cache", lambda *_, **__: str(cached / "config.json"))
    monkeypatch.setattr(locating, "snapshot_download", download)
    assert locate("org/quantized") == ("org/quantized", None)
    assert locating.fetch_quantized("org/quantized", "v1") and asked == [("org/quantized", "v1")]
    assert locate("org/quantized") == (str(cached), None)
    (cached / "model.safetensors").unlink()
    monkeypatch.setattr(locating, "snapshot_download", lambda *_, **__: None)
    with pytest.raises(lp.PrunerError, match="org/quantized holds no safetensors weights"):
        locating.fetch_quantized("org/quantized")
    settings = json.loads(config.read_text())
    (cached / "config.json").write_text(json.dumps(settings | {"quantization_config": {"quant_method": "quark"}}))
    with pytest.raises(lp.PrunerError, match=r"is quantized \(quantization_config: quark\)"):
        locating.fetch_quantized("org/quantized")


def test_tokens_are_cut_from_quantized_files(home, with_tokenizer, tmp_path):
    out = tmp_path / "out"
    argv = [
        "vocab",
        str(with_tokenizer),
        str(out),
        "--scripts",
        "Greek",
        "--eval_dataset",
        "general",
        "--device",
        "cpu",
    ]
    assert main([*argv, "--max_windows", "2"]) == 0
    old, new = stored(with_tokenizer), stored(out)
    kept = lp.PruningPlan.load(out / "pruning_plan.json").tokens
    assert torch.equal(new.pop("model.embed_tokens.weight"), old.pop("model.embed_tokens.weight")[kept])
    assert torch.equal(new.pop("lm_head.weight"), old.pop("lm_head.weight")[kept])
    assert old.keys() == new.keys()
    assert all(torch.equal(new[name].view(torch.uint8), old[name].view(torch.uint8)) for name in old)


def refused(argv, capsys):
    assert main(argv) == 2
    error = capsys.readouterr().err.strip()
    assert error.count("\n") == 0
    return error


def test_flags_that_quantized_files_cannot_follow(home, with_tokenizer, tmp_path, capsys):
    argv = ["prune", str(with_tokenizer), str(tmp_path / "out"), *PRUNE]
    for refit in ("lora", "ridge"):
        error = refused([*argv, "--refit", refit], capsys)
        assert "--refit changes weights" in error and "add --dequantize, which writes 16 bits" in error
    assert "--rescale_norms changes weights" in refused([*argv, "--kinds", "hidden", "--rescale_norms"], capsys)
    assert "--dequantize has no effect on" in refused(["prune", "smollm2-135m", *PRUNE, "--dequantize"], capsys)
    plan = str(home / "pruned" / "pruning_plan.json")
    other = ["apply", plan, str(home / "base"), str(tmp_path / "out"), "--dequantize"]
    assert "which is not quantized: leave it out" in refused(other, capsys)
    refitted = lp.PruningPlan.load(plan)
    refitted.settings["refit"] = asdict(
        RefitRecord(calibration=CalibrationSettings(dataset="self", samples=32, tokens=8), compensation="bias")
    )
    refitted.save(tmp_path / "plan.json")
    other = ["apply", str(tmp_path / "plan.json"), str(with_tokenizer), str(tmp_path / "out"), "--refit"]
    assert "--refit changes weights" in refused(other, capsys)
    other = ["vocab", str(home / "base"), str(tmp_path / "out"), "--scripts", "Greek", "--dequantize"]
    assert "which is not quantized: leave it out" in refused(other, capsys)


@pytest.mark.parametrize("method", ["bitsandbytes", "torchao", "hqq"])
def test_other_formats_are_refused_by_name(method, folders, tmp_path):
    shutil.copytree(folders("qwen3", "fp8")[0], tmp_path / "model")
    document = json.loads((tmp_path / "model" / "config.json").read_text())
    document["quantization_config"] = {"quant_method": method}
    (tmp_path / "model" / "config.json").write_text(json.dumps(document))
    with pytest.raises(
        lp.PrunerError, match=rf"is quantized \(quantization_config: {method}\).*dequantize it to 16 bits"
    ):
        lp.load(str(tmp_path / "model"))


NAME = "model.layers.1.self_attn.q_proj.weight"
DAMAGED = [
    ("fp8", {NAME + "_scale_inv": None}, f"{NAME} in .* is float8_e4m3fn and has no scale that fp8 describes"),
    ("fp8", {NAME: None}, f"lacks {NAME}, whose scales it holds"),
    ("fp8", {NAME + "_scale_inv": torch.ones(8, 3)}, r"is \[8, 3\]; a weight \[128, 64\] .*16 x 16 needs \[8, 4\]"),
    ("ct_int4", {NAME + "_scale": None}, f"lacks {NAME}_scale, which {NAME}_packed needs"),
    ("ct_int4", {NAME + "_scale": torch.ones(128, 1)}, r"is \[128, 1\]; .* groups give .* scales of \[128, 2\]"),
    ("ct_int4", {NAME + "_shape": None}, f"lacks {NAME}_shape"),
    ("ct_int4", {NAME + "_packed": None}, f"lacks {NAME}, whose scales it holds"),
    ("gptq", {NAME[:-6] + "scales": None}, "lacks model.layers.1.self_attn.q_proj.scales"),
    ("awq", {NAME[:-6] + "qzeros": torch.ones(2, 3)}, r"qzeros in .* is \[2, 3\]; the config's groups need \[2, 16\]"),
    ("ct_int4", {NAME + "_g_idx": torch.zeros(64)}, "this form of compressed-tensors is not supported"),
]


@pytest.mark.parametrize(("how", "changes", "message"), DAMAGED)
def test_damaged_files_are_refused(how, changes, message, folders, tmp_path):
    shutil.copytree(folders("qwen3" if how == "fp8" else "qwen3_moe", how)[0], tmp_path / "model")
    tensors = {key: value for key, value in (stored(tmp_path / "model") | changes).items() if value is not None}
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(lp.PrunerError, match=message):
        lp.load(str(tmp_path / "model"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"bits": 8}, "with 8 bits and the version gemm is not read"),
        ({"w_bit": 4, "version": "GEMV"}, "with 4 bits and the version gemv is not read"),
    ],
)
def test_other_forms_of_awq_are_named(config, message):
    with pytest.raises(lp.PrunerError, match=message):
        next(awq_weights(SimpleNamespace(folder="model", tensors={}), config))


@pytest.mark.parametrize(
    ("change", "message"), [("missing", "lacks .*_scales, which"), ("shape", "need one scale for")]
)
def test_damaged_blocks_are_refused(change, message, folders, tmp_path):
    shutil.copytree(folders("gpt_oss", "mxfp4")[0], tmp_path / "model")
    tensors = stored(tmp_path / "model")
    name = "model.layers.1.mlp.experts.down_proj_scales"
    scales = tensors.pop(name)
    if change == "shape":
        tensors[name] = scales[:, :, :1].contiguous()
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(lp.PrunerError, match=message):
        lp.load(str(tmp_path / "model"))


def test_a_missing_expert_is_refused(folders, tmp_path):
    shutil.copytree(folders("qwen3_moe", "fp8")[0], tmp_path / "model")
    tensors = {k: v for k, v in stored(tmp_path / "model").items() if ".experts.3." not in k}
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    _, plan = plan_of(folders("qwen3_moe", "fp8")[0], "experts")
    with pytest.raises(lp.PrunerError, match="its stored tensors make"):
        apply_to_files(plan, str(tmp_path / "model"), tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e8m0fnu])
def test_scales_may_be_powers_of_two(dtype, folders, tmp_path):
    shutil.copytree(folders("qwen3", "fp8")[0], tmp_path / "model")
    tensors = stored(tmp_path / "model")
    powers = {key: value.log2().round() for key, value in tensors.items() if key.endswith("_scale_inv")}
    floats = {key: value.exp2() for key, value in powers.items()}
    narrow = {key: (value + 127).to(torch.uint8).view(dtype) for key, value in powers.items()}
    models = []
    for scales in (floats, narrow):
        save_file(tensors | scales, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
        models.append(lp.load(str(tmp_path / "model"), "float32")[0])
    assert same(*models)
    plan = plan_of(tmp_path / "model", "layers")[1]
    apply_to_files(plan, str(tmp_path / "model"), tmp_path / "out")
    assert same(lp.load(str(tmp_path / "out"), "float32")[0], lp.apply(models[0], plan))


def test_a_last_block_may_be_shorter():
    """As the 576 rows of DeepSeek-V3's kv_a_proj_with_mqa in blocks of 128."""
    scale = Part(name="scale", dims=((0, 128), (1, 128)))
    weight = Weight(name="w", shape=(576, 256), parts={"scale": scale}, decode=dict)
    kept = torch.cat([torch.arange(128), torch.arange(512, 576)])
    assert part_positions(weight, scale, {0: kept})[0].tolist() == [0, 4]
    with pytest.raises(InsideBlock, match="one number for 128 values"):
        part_positions(weight, scale, {0: kept[:-1]})


def test_blocks_of_a_unit():
    def size(label, *spans, indices=64):
        unit = Unit("mlp.neurons", "neurons", 0, indices, dims={("w", 0): label})
        return block_size(unit, {"w": {0: set(spans)}})

    neurons = torch.arange(64)
    assert size(neurons, (0, 64, 16)) == 16
    assert size(neurons, (0, 64, 64)) is None  # one block is the whole unit
    assert size(torch.cat([neurons, neurons]), (0, 64, 16), (64, 128, 32)) == 32
    assert size(torch.cat([neurons, neurons]), (0, 128, 48)) is None  # a block holds ends of both
    assert size(neurons.repeat_interleave(2), (0, 128, 16)) == 8  # interleaved, as in gpt-oss
    heads = torch.arange(4).repeat_interleave(32)
    assert size(heads, (0, 128, 16), indices=4) == 1
    assert size(heads, (0, 128, 64), indices=4) == 2


def test_units_that_share_blocks_are_frozen(folders):
    model, _ = lp.load(str(folders("qwen3", "fp8")[0]))
    graph = lp.trace(model)
    blocks = {f"model.layers.{i}.mlp.up_proj.weight": {0: {(0, 96, 96)}} for i in range(3)}
    assert not in_blocks(graph, blocks).of_kind("neurons") and graph.of_kind("neurons")
    with pytest.raises(lp.PrunerError, match=r"--kinds neurons: .*--dequantize"):
        in_blocks(graph, blocks, ("neurons",))


def test_counts_and_devices_keep_whole_blocks(folders):
    model, _ = lp.load(str(folders("qwen3", "fp8")[0]))
    graph = lp.trace(model).copy()
    for unit in graph.of_kind("neurons"):
        unit.block = 16
    scores = lp.score(model, graph, criterion="random", kinds=["neurons"])
    with pytest.raises(lp.PrunerError, match="cannot keep 40: its quantized weights go in blocks of 16"):
        lp.select(graph, scores, counts={"neurons": 40})
    for options in ({"tensor_parallel": 2}, {"scope": "global"}, {"uniform": True}, {"target_params": 135_808}):
        plan = lp.select(graph, scores, 0.5, kinds=["neurons"], **options)
        for choice in plan.units.values():
            assert torch.bincount(choice.kept // 16).unique().tolist() in ([16], [0, 16]), options


@pytest.mark.parametrize(
    ("how", "field", "value"), [("fp8", "weight_block_size", [0, 16]), ("gptq", "group_size", "a")]
)
def test_damaged_settings_are_refused_in_one_line(how, field, value, tmp_path):
    unquantized("qwen3", tmp_path / "plain")
    quantized(tmp_path / "plain", tmp_path / "damaged", how)
    config = json.loads((tmp_path / "damaged" / "config.json").read_text())
    config["quantization_config"][field] = value
    (tmp_path / "damaged" / "config.json").write_text(json.dumps(config))
    with pytest.raises(lp.PrunerError, match="the quantization_config is damaged"):
        lp.load(str(tmp_path / "damaged"))
