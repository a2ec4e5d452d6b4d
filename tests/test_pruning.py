"""The pruning run as one call in Python: flags, settings, kinds, progress, results."""

import json
import sys
import weakref
from dataclasses import FrozenInstanceError

import psutil
import pytest
import torch
from helpers.models import build
from transformers import AutoModelForCausalLM

import llm_pruner as lp
from llm_pruner.logs import log
from llm_pruner.peak_memory import give_back_memory
from llm_pruner.pruning import run as run_module
from llm_pruner.pruning.arguments import HfPruneArguments, PruneArguments
from llm_pruner.pruning.calibration import calibration_set
from llm_pruner.pruning.evaluation import warn_of_lost_quality
from llm_pruner.pruning.mending import training_text
from llm_pruner.pruning.planning import PlannedModel, log_plan
from llm_pruner.pruning.settings import CalibrationSettings, resolve_settings

QUICK = {"pruner_type": "l2", "compensate": "none", "eval_datasets": "", "hardware_align": False}


def test_prune_is_the_command_as_one_call(home, home_text, tmp_path):
    """Model, tokenizer, plan and metrics are those of the folder that is written."""
    stages = []
    run = lp.prune(
        str(home / "base"),
        **QUICK | {"eval_datasets": str(home_text), "max_seq_len": 32, "max_windows": 2},
        target_params=0.9,
        output=tmp_path / "smaller",
        progress=lambda stage, done, total: stages.append((stage, done / total)),
    )
    assert run.folder == tmp_path / "smaller"
    assert json.loads((run.folder / "metrics.json").read_text()) == run.metrics
    assert lp.PruningPlan.load(run.folder / "pruning_plan.json").units.keys() == run.plan.units.keys()
    assert 0.895 < run.metrics["parameters_ratio"] <= 0.9
    ids = torch.arange(12)[None]
    reloaded = AutoModelForCausalLM.from_pretrained(run.folder)
    assert torch.equal(run.model(ids).logits, reloaded(ids).logits)
    assert len(run.tokenizer) == run.model.config.vocab_size
    assert stages[0] == ("load", 0.0) and ("save", 1.0) in stages
    assert [line.split()[1] for line in (run.folder / "prune.log").read_text().splitlines()[-5:]] == [
        *("run", "model:", "load:", "serve:", "next:"),
    ]


def test_prune_without_output_writes_nothing(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = lp.prune(str(home / "base"), **QUICK, pruning_ratio=0.5)
    assert run.folder is None and not list(tmp_path.iterdir())
    assert sum(p.numel() for p in run.model.parameters()) == run.metrics["parameters_after"]


def test_prune_takes_old_spellings_and_names_the_nearest_flag():
    assert PruneArguments.of(base_model="x").model == "x"
    with pytest.raises(lp.PrunerError, match="unknown argument prunning_ratio; did you mean pruning_ratio"):
        lp.prune(prunning_ratio=0.5)
    with pytest.raises(lp.PrunerError, match="--taylor 'third' is not valid: choose from vectorize, param_first"):
        lp.prune(taylor="third")


def test_settings_are_frozen_and_resolve_twice_alike():
    arguments = PruneArguments(device="cpu", eval_device="cpu")
    first, second = resolve_settings(arguments), resolve_settings(arguments)
    assert first == second
    with pytest.raises(FrozenInstanceError):
        first.model.device = "cuda"


@pytest.mark.parametrize(
    ("flags", "changed"),
    [
        ({"pruner_type": "wanda"}, {"scoring"}),
        ({"taylor": "param_mix"}, {"scoring"}),
        ({"global_pruning": True}, {"widths"}),
        ({"block_mlp_layer_start": 2}, {"widths"}),
        ({"num_examples": 64}, {"calibration"}),
        ({"iterative_steps": 2}, {"widths"}),
        ({"layer_wise": True}, {"layers"}),
        ({"compensate": "none"}, {"refit"}),
    ],
)
def test_a_flag_changes_its_own_default_and_no_other(flags, changed):
    before = vars(resolve_settings(PruneArguments(device="cpu", eval_device="cpu")))
    after = vars(resolve_settings(PruneArguments(device="cpu", eval_device="cpu", **flags)))
    assert {name for name in before if before[name] != after[name]} == changed


def test_hf_prune_has_the_defaults_of_the_paper():
    settings = resolve_settings(HfPruneArguments())
    assert (settings.scoring.taylor, settings.calibration.samples, settings.calibration.tokens) == (
        "param_first",
        10,
        64,
    )
    assert settings.refit.compensation == "none" and not settings.widths.align


@pytest.mark.parametrize(
    ("kinds", "budget"),
    [
        ("heads", {"pruning_ratio": 0.5}),
        ("heads,neurons", {"pruning_ratio": 0.5}),
        (["neurons", "query_heads"], {"pruning_ratio": 0.5}),
        ("hidden", {"pruning_ratio": 0.25}),
        ("layers", {"pruning_ratio": 0.34}),
        ("layers,neurons", {"pruning_ratio": 0.34}),
        ("layers,neurons", {"target_params": 0.7}),
        ("neurons", {"target_macs": 0.9, "budget_tokens": 16}),
    ],
)
def test_kinds_limit_the_units_that_are_cut(home, kinds, budget):
    run = lp.prune(str(home / "base"), **QUICK, kinds=kinds, depth="last", block_mlp_layer_start=0, **budget)
    chosen = set(kinds.split(",") if isinstance(kinds, str) else kinds)
    assert {choice.kind for choice in run.plan.units.values()} == chosen


def test_experts_are_a_kind(home, tmp_path):
    tokenizer = lp.load(str(home / "base"))[1]
    lp.save(build("mixtral", vocab_size=len(tokenizer)), tokenizer, tmp_path / "mixture")
    run = lp.prune(str(tmp_path / "mixture"), **QUICK, kinds="experts", pruning_ratio=0.5)
    assert {choice.kind for choice in run.plan.units.values()} == {"experts"}
    assert len(run.plan.units) == run.model.config.num_hidden_layers  # no layer is spared unless ranges say so
    assert run.model.config.num_local_experts == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"kinds": "vocabulary"}, "llm-pruner vocab"),
        ({"kinds": "experts"}, "the model has no experts to prune; it has"),
        ({"kinds": "heads", "block_wise": True}, "--block_wise and --kinds exclude each other"),
        ({"kinds": "heads", "shares": "heads=1", "target_params": 0.5}, "--kinds and --shares exclude each other"),
        ({"kinds": "toes"}, "--kinds 'toes' is not valid: choose from heads"),
        ({"shares": "heads=1", "target_params": 0.5, "block_mlp_layer_start": 1}, "--shares and --block_mlp_layer_st"),
    ],
)
def test_kinds_that_cannot_be_cut_are_refused(home, flags, message):
    with pytest.raises(lp.PrunerError, match=message):
        lp.prune(str(home / "base"), **QUICK, **flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"hidden_size": 16, "pruning_ratio": 0.3}, "--hidden_size and --pruning_ratio exclude each other"),
        ({"hidden_size": 16, "block_mlp_layer_end": 2}, "--hidden_size and --block_mlp_layer_end exclude each other"),
        ({"intermediate_size": 16, "round_to": 8}, "--intermediate_size and --round_to exclude each other"),
    ],
)
def test_flags_without_effect_beside_a_shape_are_refused(flags, message):
    with pytest.raises(lp.PrunerError, match=message):
        resolve_settings(PruneArguments(**flags))


def test_further_samples_of_several_texts_repeat_none(tokenizer, tmp_path):
    """The shorter text ends first, so that more samples are mixed otherwise than those at hand."""
    for name, count in (("short", 10), ("long", 60)):
        lines = [f"{name} {i} {' '.join(str(i * j) for j in range(20))}" for i in range(count)]
        (tmp_path / f"{name}.txt").write_text("\n\n".join(lines))
    dataset = f"{tmp_path}/short.txt,{tmp_path}/long.txt"
    settings = CalibrationSettings(dataset=dataset, samples=16, tokens=16, fewer_samples=True)
    model = build("llama")
    ids = calibration_set(settings, tokenizer, model)
    text = training_text(settings, tokenizer, model, samples=60, seed=0, text=ids)
    assert torch.equal(text[:16], ids) and len(text) > 40
    assert len(text.unique(dim=0)) == len(text)


def test_a_call_refuses_its_inputs_before_the_model_is_read(home, monkeypatch):
    def read_weights(*_: object, **__: object):
        pytest.fail("weights were read")

    monkeypatch.setattr("llm_pruner.checkpoint.load._read_model", read_weights)
    for flags, words in (
        ({"calib_dataset": "nothing.txt"}, "--calib_dataset nothing.txt"),
        ({"eval_datasets": "nothing.txt"}, "--eval_datasets nothing.txt"),
        ({"intermediate_size": 4096}, "4096"),
    ):
        with pytest.raises(lp.PrunerError, match=words):
            lp.prune(str(home / "base"), **flags)


@pytest.mark.parametrize(("after", "warnings"), [(99.0, 0), (1234.0, 1)])
def test_a_destroyed_model_is_warned_of(after, warnings, caplog, monkeypatch):
    monkeypatch.setattr(log, "propagate", True)
    measured = {when: {"perplexity": {"t": {"perplexity": p}}} for when, p in (("before", 10.0), ("after", after))}
    warn_of_lost_quality(measured)
    assert [r.levelname for r in caplog.records] == ["WARNING"] * warnings
    assert all("perplexity on t is 123 times the original's" in r.message for r in caplog.records)


@pytest.mark.parametrize(("vocabulary", "said"), [(96, False), (4096, True)])
def test_a_vocabulary_that_takes_much_of_the_model_is_named(vocabulary, said, caplog, monkeypatch):
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level("INFO", logger=log.name)
    model = build("llama", vocab_size=vocabulary)
    parameters = sum(p.numel() for p in model.parameters())
    log_plan(PlannedModel(plan=lp.PruningPlan(), pruned=model, graph=lp.trace(model)), parameters)
    rows = {id(p): p.numel() for m in (model.lm_head, model.model.embed_tokens) for p in m.parameters()}
    share = 100 * sum(rows.values()) / parameters
    expected = [f"{share:.0f}% of the parameters belong to {vocabulary:,} tokens"] if said else []
    assert [line for r in caplog.records if (line := r.getMessage().partition(":")[0]).endswith("tokens")] == expected


@pytest.mark.parametrize(("lost", "said"), [(0.6, False), (0.75, True)])
def test_whole_layers_are_suggested_where_most_neurons_go(lost, said, caplog, monkeypatch):
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level("INFO", logger=log.name)
    model = build("llama", num_hidden_layers=8)
    graph, total = lp.trace(model), sum(p.numel() for p in model.parameters())
    neurons = sum(graph.parameters_of(unit) for unit in graph.of_kind("neurons"))
    scores = lp.score(model, graph, criterion="l2")
    plan = lp.select(graph, scores, kinds=("neurons",), target_params=(total - lost * neurons) / total)
    log_plan(PlannedModel(plan=plan, pruned=model, graph=graph), total)
    assert ("of 8 layers go: a model often keeps more where a few whole layers go first" in caplog.text) == said
    assert ("--num_layers 7 --depth block_influence" in caplog.text) == said


def test_the_original_is_freed_before_the_pruned_model_is_measured(home, home_text, monkeypatch):
    loaded, alive, load, evaluate = [], {}, run_module.load_or_reuse, run_module.evaluate_model

    def load_and_watch(*args):
        model, tokenizer = load(*args)
        loaded.append(weakref.ref(model))
        return model, tokenizer

    def evaluate_and_look(*args, when, **options):
        alive[when] = loaded[0]() is not None
        return evaluate(*args, when=when, **options)

    monkeypatch.setattr(run_module, "load_or_reuse", load_and_watch)
    monkeypatch.setattr(run_module, "evaluate_model", evaluate_and_look)
    texts = {"eval_datasets": str(home_text), "max_seq_len": 32, "max_windows": 2}
    lp.prune(str(home / "base"), **QUICK | texts, pruning_ratio=0.5)
    assert alive == {"before pruning": True, "after pruning": False}


def test_freed_memory_goes_back_to_the_system():
    """Small tensors, which the allocator of C keeps for the process."""
    tensors = [torch.ones(2**15) for _ in range(1024)]
    stopper, held = torch.ones(2**15), psutil.Process().memory_info().rss
    del tensors
    give_back_memory()
    assert psutil.Process().memory_info().rss < held - 100 * 2**20 or sys.platform != "linux"
    assert stopper[0] == 1
