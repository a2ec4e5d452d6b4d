"""Checkpoints whose layers differ, padded or with a modelling file, so that they load without llm_pruner."""

import json
import os
import subprocess
import sys

import pytest
import torch
from helpers.architectures import tiny_model
from helpers.models import build, pruned_by, tokens
from transformers import AutoModelForCausalLM

import llm_pruner as lp
from llm_pruner.checkpoint.apply_files import apply_to_files
from llm_pruner.checkpoint.standalone import FILE
from llm_pruner.cli import main
from llm_pruner.errors import PrunerError
from llm_pruner.models.per_layer import REFUSAL, has_per_layer_widths
from llm_pruner.selection.budgets import UNITS, Budget
from llm_pruner.surgery.uniform import to_uniform

# Reads checkpoints in a process that has not heard of llm_pruner, and writes their logits and what they generate.
STRANGER = """
import sys, json, torch
from transformers import AutoModelForCausalLM
ids = torch.tensor([[5, 6, 7, 8]])
found = {}
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=sys.argv[1] == "trust").eval()
    out = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    if not folder.endswith(".again"):
        model.save_pretrained(folder + ".again")
    found[folder] = [model(ids).logits[0, -1].tolist(), out.tolist()]
assert not any(name == "llm_pruner" or name.startswith("llm_pruner.") for name in sys.modules)
print(json.dumps(found))
"""


# Tries every folder in a process that has not heard of llm_pruner, also with the flag that fills gaps at random.
REFUSED = """
import sys, json
from transformers import AutoConfig, AutoModelForCausalLM
found = {}
for folder in sys.argv[1:]:
    AutoConfig.from_pretrained(folder)
    for flags in ({}, {"ignore_mismatched_sizes": True}):
        try:
            AutoModelForCausalLM.from_pretrained(folder, **flags)
        except ValueError as error:
            found.setdefault(folder, []).append(str(error))
print(json.dumps(found))
"""


def read_by_a_stranger(tmp_path, *folders, trust=True):
    """Return ``[logits, generated]`` by folder, as transformers alone reads them."""
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ""}
    command = [sys.executable, "-c", STRANGER, "trust" if trust else "", *map(str, folders)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def expected_of(model):
    ids = torch.tensor([[5, 6, 7, 8]])
    out = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    return [model(ids).logits[0, -1].tolist(), out.tolist()]


@pytest.mark.parametrize("kinds", [("neurons",), ("heads",), ("heads", "neurons")])
def test_zeros_make_layers_equal_and_change_nothing(architecture, kinds):
    model = build(architecture)
    _, pruned = pruned_by(model, kinds=kinds, layers=[1])
    plain = to_uniform(pruned)
    assert not plain.config.is_heterogeneous and "submodule_overrides" not in plain.config.to_dict()
    ids = tokens()
    with torch.no_grad():
        assert (plain(ids).logits - pruned(ids).logits).abs().max() < 2e-6


def test_layers_of_several_widths():
    model = build("llama_grouped", intermediate_size=64, num_attention_heads=8, num_key_value_heads=4)
    graph = lp.trace(model)
    scores = lp.score(model, graph, criterion="random")
    plan = lp.select(graph, scores, 0.6, scope="global")
    assert len({c.kept.numel() for c in plan.units.values() if c.kind == "neurons"}) > 1
    pruned = lp.apply(model, plan)
    plain = to_uniform(pruned)
    widths = [layer.mlp.up_proj.out_features for layer in pruned.model.layers]
    assert {layer.mlp.up_proj.out_features for layer in plain.model.layers} == {max(widths)}
    with torch.no_grad():
        assert (plain(tokens()).logits - pruned(tokens()).logits).abs().max() < 2e-6


def test_models_whose_logits_zeros_would_change_are_refused():
    _, pruned = pruned_by(build("mixtral"), kinds=("experts",), layers=[1])
    with pytest.raises(PrunerError, match="padding with zeros changes the logits"):
        to_uniform(pruned)
    with pytest.raises(PrunerError, match="the same widths already"):
        to_uniform(build("llama"))


def test_a_uniform_checkpoint_loads_without_us(home, tmp_path, capsys):
    assert main(["to-uniform", str(home / "pruned"), str(tmp_path / "plain"), "--allow_padding"]) == 0
    assert (tmp_path / "plain" / "tokenizer.json").is_file()
    model, _ = lp.load(str(home / "pruned"))
    ((logits, written),) = read_by_a_stranger(tmp_path, tmp_path / "plain", trust=False).values()
    expected = expected_of(model)
    assert logits == pytest.approx(expected[0], abs=1e-5) and written == expected[1]
    assert main(["to-uniform"]) == 2
    assert "give a checkpoint and a folder" in capsys.readouterr().err


def test_standalone_checkpoints_load_without_us(tmp_path):
    """A checkpoint that stock transformers saved again still computes the same, and loads here."""
    expected, folders = {}, []
    for name in ("llama_grouped", "gpt2", "opt", "mixtral"):
        plan, pruned = pruned_by(build(name), layers=[1])
        lp.save(pruned, None, tmp_path / name, plan, standalone=True)
        folders += [tmp_path / name, tmp_path / f"{name}.again"]
        expected |= dict.fromkeys(map(str, folders[-2:]), expected_of(pruned))
        assert expected_of(AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()) == expected[str(folders[-1])]
    assert read_by_a_stranger(tmp_path, *folders) == expected


def test_transformers_alone_refuses_layers_that_differ(tmp_path):
    """Its error says what to do, wherever a model was saved from; with llm_pruner the same folders load."""
    for name in ("llama_grouped", "gpt2"):
        plan, pruned = pruned_by(build(name), layers=[1])
        lp.save(pruned, None, tmp_path / name, plan, standalone=name == "gpt2")
    graph = lp.trace(build("llama_grouped"))
    plan = lp.PruningPlan()
    plan.drop_block("model.layers.1.self_attn", graph.shapes)  # no tensor has another shape: some are not there
    lp.apply(build("llama_grouped"), plan).save_pretrained(tmp_path / "no_attention")
    lp.save(build("llama_grouped"), None, tmp_path / "whole")
    apply_to_files(plan, str(tmp_path / "whole"), tmp_path / "streamed")
    for name in ("llama_grouped", "gpt2", "no_attention"):
        AutoModelForCausalLM.from_pretrained(tmp_path / name).save_pretrained(tmp_path / f"{name}.again")
    folders = [str(f) for f in tmp_path.iterdir() if f.name != "whole"]
    run = subprocess.run(
        [sys.executable, "-c", REFUSED, *folders], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ""}
    )
    errors = json.loads(run.stdout.splitlines()[-1])
    assert len(folders) == 7 and errors.keys() == set(folders)
    assert all(len(found) == 2 and all(REFUSAL in error for error in found) for found in errors.values())


@pytest.mark.parametrize("name", ["gemma4_text", "llama"])
def test_layers_that_transformers_builds_itself_are_not_refused(name, tmp_path):
    """Gemma 4 reads per-layer configs in its own modelling file."""
    lp.save(tiny_model(name), None, tmp_path / name)
    read_by_a_stranger(tmp_path, tmp_path / name, trust=False)


@pytest.mark.slow
def test_the_modelling_file_is_written_on_request_only(home, tmp_path):
    flags = ["--base_model", str(home / "base"), "--pruner_type", "l2", "--pruning_ratio", "0.4", "--save_model"]
    flags += ["--output_root", str(tmp_path), "--eval_datasets", "", "--block_wise", "--block_mlp_layer_start", "1"]
    flags += ["--block_mlp_layer_end", "2", "--block_attention_layer_start", "1", "--block_attention_layer_end", "2"]
    for i, extra in enumerate([["--standalone"], ["--standalone", "--stream"]]):
        assert main(["prune", *flags, "--save_ckpt_log_name", f"run{i}", *extra]) == 0
        assert (tmp_path / f"run{i}" / FILE).is_file()
    read_by_a_stranger(tmp_path, tmp_path / "run0", tmp_path / "run1")
    model, tokenizer = lp.load(str(tmp_path / "run0"))
    lp.save(model, tokenizer, tmp_path / "again")
    assert not (tmp_path / "again" / FILE).exists()
    assert "auto_map" not in json.loads((tmp_path / "again" / "config.json").read_text())


def test_code_of_a_checkpoint_runs_only_if_trusted(home, tmp_path):
    """A modelling file that would leave a mark does not, unless the flag is given."""
    model, tokenizer = lp.load(str(home / "pruned"))
    lp.save(model, tokenizer, tmp_path / "model", standalone=True)
    mark = tmp_path / "mark"
    file = tmp_path / "model" / FILE
    file.write_text(f"open({str(mark)!r}, 'w')\n" + file.read_text())
    lp.load(str(tmp_path / "model"))
    assert main(["inspect", str(tmp_path / "model")]) == 0
    assert not mark.exists()


WIDE = {"intermediate_size": 128, "num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 4}


@pytest.mark.parametrize("budget", ["target_params", "target_macs", "target_memory", "pruning_ratio"])
def test_uniform_runs_leave_a_plain_checkpoint(tokenizer, tmp_path, budget):
    model = build("llama_grouped", vocab_size=len(tokenizer), intermediate_size=512)
    lp.save(model, tokenizer, tmp_path / "model")
    kept = "heads,neurons" if budget == "target_params" else "neurons"
    flags = {budget: 0.25 if budget == "pruning_ratio" else 0.95, "compensate": "none", "eval_datasets": ""}
    run = lp.prune(str(tmp_path / "model"), uniform=True, kinds=kept, pruner_type="l2", budget_tokens=16, **flags)
    assert not has_per_layer_widths(run.model.config)
    neurons = [c.kept.tolist() for c in run.plan.units.values() if c.kind == "neurons"]
    assert len(neurons) == model.config.num_hidden_layers and len(set(map(len, neurons))) == 1
    assert neurons[0] != neurons[1]  # which indices stay differs by layer
    assert lp.verify(model, run.model, run.plan).equivalent


def test_uniform_meets_a_latency():
    """By a stand-in for the clock: microseconds that grow with the neurons of all layers."""
    model = build("llama", intermediate_size=512)
    graph = lp.trace(model)

    def microseconds(plan):
        return 1000 + sum(
            len(plan.units[u.name].kept) if u.name in plan.units else u.size for u in graph.of_kind("neurons")
        )

    budget = Budget("target_latency", 0.8, microseconds, UNITS["target_latency"], "microseconds")
    plan = lp.select(graph, lp.score(model, graph, criterion="l2"), kinds=("neurons",), budget=budget, uniform=True)
    assert 0.795 * microseconds(lp.PruningPlan()) <= microseconds(plan) <= 0.8 * microseconds(lp.PruningPlan())
    assert not has_per_layer_widths(lp.apply(model, plan).config)


def test_uniform_targets_are_met_where_a_head_of_every_layer_is_too_much():
    """Heads go in steps of a whole head per layer; neurons do what such a step would overdo."""
    model = build("llama_grouped", **WIDE | {"num_key_value_heads": 2, "num_attention_heads": 4})
    graph = lp.trace(model)
    scores = lp.score(model, graph, criterion="l2")
    for target in (0.95, 0.9, 0.85):
        plan = lp.select(graph, scores, {"heads": 1, "neurons": 1}, target_params=target, uniform=True)
        pruned = lp.apply(model, plan)
        assert not has_per_layer_widths(pruned.config)
        share = sum(p.numel() for p in pruned.parameters()) / sum(p.numel() for p in model.parameters())
        assert target * 0.995 <= share <= target


def test_uniform_reaches_both_halves_of_an_encoder_decoder_and_experts():
    for name, kinds in (("t5:seq2seq", ("heads", "neurons")), ("mixtral", ("experts",)), ("deepseek_v3", ("neurons",))):
        model = build(name) if name == "mixtral" else tiny_model(name)
        graph = lp.trace(model)
        plan = lp.select(graph, lp.score(model, graph, criterion="l2"), 0.5, kinds=kinds, uniform=True)
        assert not has_per_layer_widths(lp.apply(model, plan).config)


def test_uniform_refuses_flags_that_make_layers_differ(home, capsys):
    graph = lp.trace(build("llama"))
    scores = lp.score(build("llama"), graph, criterion="random")
    for wrong in ({"layers": [0]}, {"scope": "global"}):
        with pytest.raises(PrunerError, match="uniform keeps the same number of indices per layer"):
            lp.select(graph, scores, 0.5, uniform=True, **wrong)
    base = ["prune", str(home / "base"), "--uniform", "--pruner_type", "l2"]
    for wrong in (["--global_pruning"], ["--block_mlp_layer_end", "2"], ["--drop_mlp", "1"]):
        assert main([*base, *wrong]) == 2
        assert f"--uniform and {wrong[0]} exclude each other" in capsys.readouterr().err
    assert main(["prune", str(home / "pruned"), "--uniform", "--pruner_type", "l2"]) == 2
    assert "have different widths: give the model that it was pruned from" in capsys.readouterr().err


def test_padding_that_undoes_pruning_is_refused(home, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(home))
    assert main(["to-uniform", "~/pruned", str(tmp_path / "plain")]) == 2
    found = capsys.readouterr().err
    assert "padding would add back 3,072 of the 3,072 removed parameters: prune with --uniform" in found
    assert not (tmp_path / "plain").exists()
    assert main(["to-uniform", str(home / "pruned"), str(tmp_path / "plain"), "--allow_padding"]) == 0
    assert "padding adds 3,072 parameters, 100% of what pruning removed" in capsys.readouterr().err
