"""Allocation by search: widths of layers by evolution, measured on refitted models."""

import json

import pytest
import torch
from helpers.architectures import tiny_model
from helpers.models import build, tokens
from safetensors import safe_open

import llm_pruner as lp
from llm_pruner.evaluation.cost import macs, macs_budget, memory_budget
from llm_pruner.models.skeleton import parameter_count
from llm_pruner.pruning.arguments import PruneArguments
from llm_pruner.refit import allocation, compensate
from llm_pruner.refit.candidates import Candidates
from llm_pruner.refit.ladder import build_ladder
from llm_pruner.report.figures import draw_pruning
from llm_pruner.report.runs import read
from llm_pruner.selection import search as space
from llm_pruner.selection.search import ALLOCATION

QUICK = {"eval_datasets": [], "calib_dataset": "general", "calib_seq_len": 32, "num_examples": 64, "self_examples": 0}

EVERY_LAYER = {"block_mlp_layer_start": 0, "block_mlp_layer_end": 3}


def divergence(model, other, ids):
    with torch.no_grad():
        log_p, log_q = model(ids).logits.log_softmax(-1), other(ids).logits.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


def unequal():
    """A model in which the MLPs of the first layers add little to the stream, and that of the last much."""
    model = build("llama", num_hidden_layers=4, intermediate_size=64)
    with torch.no_grad():
        for layer, share in zip(model.model.layers, (0.05, 0.05, 1.0, 2.0), strict=True):
            layer.mlp.down_proj.weight.mul_(share)
    return model


def neurons(plan, graph):
    units = graph.of_kind("neurons")
    return [len(plan.units[u.name].kept) if u.name in plan.units else u.size for u in units]


@pytest.fixture(scope="module")
def setting():
    model = unequal()
    graph = lp.trace(model)
    return model, graph, lp.score(model, graph, criterion="l2", kinds=["neurons", "heads"]), tokens(96, 16)


def search(setting, **options):
    model, graph, scores, ids = setting
    return lp.search(model, graph, scores, ids, **{"target_params": 0.8, "kinds": ["neurons"], **options})


def test_a_search_beats_equal_shares_where_layers_differ(setting):
    model, graph, scores, ids = setting
    uniform = lp.select(graph, scores, target_params=0.8, kinds=["neurons"])
    plan = search(setting, generations=6)
    narrow, _, _, wide = neurons(plan, graph)
    assert narrow < 32 < wide, neurons(plan, graph)
    refitted = {}
    for name, one in (("uniform", uniform), ("search", plan)):
        pruned = lp.apply(model, one)
        assert 0.795 < parameter_count(pruned) / parameter_count(model) <= 0.8
        assert lp.verify(model, pruned, one).equivalent
        lp.compensate(model, pruned, ids)
        refitted[name] = divergence(model, pruned, tokens(16, 16, seed=9))
    assert refitted["search"] < 0.7 * refitted["uniform"], refitted
    history = plan.settings[ALLOCATION]["distances"]
    assert len(history) == 7 and history == sorted(history, reverse=True) and history[-1] < 0.7 * history[0]


def test_equal_seeds_give_equal_plans_and_others_differ(setting):
    one, two, other = (search(setting, generations=1, seed=seed).settings[ALLOCATION] for seed in (1, 1, 2))
    assert one == two != other


def test_a_search_that_was_killed_goes_on(setting, tmp_path, monkeypatch):
    whole, cache = search(setting, generations=2), tmp_path / "search.safetensors"
    measured = []
    own = Candidates.distance

    def measure(self, *args):
        measured.append(args)
        if len(measured) == 15:
            raise KeyboardInterrupt
        return own(self, *args)

    monkeypatch.setattr(Candidates, "distance", measure)
    with pytest.raises(KeyboardInterrupt):
        search(setting, generations=2, cache=cache)
    with safe_open(cache, "pt") as file:
        assert len(json.loads(file.metadata()["record"])) == 14
    resumed = search(setting, generations=2, cache=cache)
    again = len(measured)
    assert resumed.kept.keys() == whole.kept.keys() and resumed.settings == whole.settings
    assert all(torch.equal(k, whole.kept[n][d]) for n, dims in resumed.kept.items() for d, k in dims.items())
    search(setting, generations=2, cache=cache)
    assert len(measured) == again, "everything is known"
    search(setting, generations=1, cache=cache, seed=5)
    assert len(measured) > again, "another search"


def test_uniform_searches_the_split_between_kinds(setting):
    model, graph, *_ = setting
    plan = search(setting, kinds=["neurons", "heads"], uniform=True, target_params=37_920, generations=2)
    for kind in ("neurons", "heads"):
        units = graph.of_kind(kind)
        assert len({len(plan.units[u.name].kept) if u.name in plan.units else u.size for u in units}) == 1
    assert parameter_count(lp.apply(model, plan)) <= 37_920
    with pytest.raises(lp.PrunerError, match="one width alone: add kinds or layers"):
        search(setting, uniform=True)


def test_other_budgets_are_met(setting, monkeypatch):
    monkeypatch.setattr(space, "RUNGS", 3)  # each is measured on the meta device
    model, graph, scores, ids = setting
    for budget in (macs_budget(model, 0.85, tokens=16), memory_budget(model, 175_232, tokens=16)):
        options = {"kinds": ["neurons"], "generations": 1, "layers": [1, 2, 3], "round_to": 4}
        plan = lp.search(model, graph, scores, ids, budget=budget, **options)
        assert 0.98 * budget.limit() <= budget.measure(plan) <= budget.limit()
        assert neurons(plan, graph)[0] == 64 and all(n % 4 == 0 for n in neurons(plan, graph))
    assert macs(lp.apply(model, plan), 16) < macs(model, 16)


@pytest.mark.parametrize("family", ("llama_grouped", "gpt2", "opt", "gpt_neox", "phi3"))
def test_a_candidate_at_the_start_is_what_the_refit_leaves(family, monkeypatch):
    """One pass for all widths gives the weights that the refit of the plan itself gives."""
    model, ids, unseen = build(family), tokens(48, 16), tokens(16, 16, seed=9)
    graph = lp.trace(model)
    scores = lp.score(model, graph, criterion="random")
    start = lp.select(graph, scores, 0.5, kinds=("heads", "neurons"))
    rungs, widths = {}, {}
    for name, choice in start.units.items():
        widths[name] = len(choice.kept)
        rungs[name] = {count: lp.select(graph, scores, counts={name: count}) for count in (1, widths[name])}
    ladder = build_ladder(model, model, graph, ids, rungs=rungs, start=start)
    assert set(ladder.units.values()) == set(start.units)
    candidates = Candidates(model, model, graph, ladder, unseen)
    monkeypatch.setattr(compensate, "scale_logits", lambda *args: None)
    pruned = lp.apply(model, start)
    compensate.compensate(model, pruned, ids)
    assert candidates.distance(widths, start) == pytest.approx(divergence(model, pruned, unseen), rel=0.01)


def test_experts_are_searched():
    model = tiny_model("mixtral")
    graph, ids = lp.trace(model), tokens(64, 16)
    scores = lp.score(model, graph, ids, "reap", kinds=["experts"])
    start = lp.select(graph, scores, 0.25, kinds=["experts"])
    target = parameter_count(lp.apply(model, start))
    plan = lp.search(model, graph, scores, ids, kinds=["experts"], target_params=target, generations=2)
    assert parameter_count(lp.apply(model, plan)) <= target
    assert plan.settings["scope"] == "search"


def test_models_without_a_head_are_compared_by_their_hidden_states():
    model = tiny_model("bert")
    graph = lp.trace(model)
    scores = lp.score(model, graph, criterion="l2", kinds=["neurons"])
    plan = lp.search(model, graph, scores, tokens(64, 16), kinds=["neurons"], target_params=0.9, generations=1)
    assert all(0 < distance < 10 for distance in plan.settings[ALLOCATION]["distances"])


def test_layers_go_first_and_widths_are_searched_in_those_that_stay(home, tmp_path):
    flags = QUICK | {"kinds": ["neurons", "heads"], "target_params": 0.8, "drop_layers": ["1"], "preset": "fast"}
    run = lp.prune(str(home / "base"), output=str(tmp_path / "a"), allocate="search", search_generations=1, **flags)
    assert len(run.plan.layers["model.layers"]) == 2
    assert run.metrics["parameters_ratio"] <= 0.8


def test_a_run_records_its_search_and_leaves_nothing_beside_its_folder(home, tmp_path):
    flags = QUICK | EVERY_LAYER | {"kinds": ["neurons"], "target_params": 0.85, "preset": "fast", "no_save": True}
    run = lp.prune(str(home / "base"), output=str(tmp_path / "a"), allocate="search", search_generations=1, **flags)
    assert len(run.metrics[ALLOCATION]["distances"]) == 2 and run.metrics["seconds"]["search"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    report = read(tmp_path / "a")
    assert report.plan.settings["scope"] == "search"
    assert [drawing.name for drawing in draw_pruning(report)][-1] == "a-search"


def test_allocate_global_is_llm_pruners_flag(home):
    flags = QUICK | EVERY_LAYER | {"kinds": ["neurons"], "pruner_type": "l2", "refit": "none", "no_save": True}
    one = lp.prune(str(home / "base"), allocate="global", **flags).plan
    two = lp.prune(str(home / "base"), global_pruning=True, **flags).plan
    three = lp.prune(str(home / "base"), allocate="uniform", **flags).plan
    kept = [[choice.kept.tolist() for choice in plan.units.values()] for plan in (one, two, three)]
    assert kept[0] == kept[1] != kept[2]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"allocate": "uniform", "global_pruning": True}, "--global_pruning and --allocate uniform exclude each other"),
        ({"allocate": "search", "global_pruning": True}, "--global_pruning and --allocate search exclude each other"),
        ({"allocate": "global", "uniform": True}, "--uniform and --allocate global exclude each other"),
        ({"allocate": "uniform", "normalize": "mean"}, "give --allocate global"),
        ({"allocate": "search"}, "--allocate search needs a budget: add one of --target_params"),
        ({"allocate": "search", "target_params": 0.8, "kinds": ["hidden"]}, "not for --kinds hidden"),
        ({"allocate": "search", "target_params": 0.8, "stream": True}, "--stream and --allocate search exclude"),
        ({"allocate": "search", "target_params": 0.8, "shares": "neurons=1"}, "--shares and --allocate search exclude"),
        ({"search_generations": 3}, "--search_generations needs --allocate"),
        ({"search_generations": 3, "allocate": "global"}, "--search_generations needs --allocate search, not global"),
        ({"search_generations": 0, "allocate": "search"}, "--search_generations 0 is out of range"),
    ],
)
def test_flags_that_contradict_the_allocation_are_refused(flags, message):
    with pytest.raises(lp.PrunerError, match=message):
        PruneArguments(model="m", **flags).check()


def test_what_cannot_be_searched_is_refused(setting):
    model, graph, scores, ids = setting
    with pytest.raises(lp.PrunerError, match="needs a budget"):
        lp.search(model, graph, scores, ids, kinds=["neurons"])
    with pytest.raises(lp.PrunerError, match="not for hidden"):
        search(setting, kinds=["hidden"])
    with pytest.raises(lp.PrunerError, match="not for hidden"):
        search(setting, kinds="hidden")
    with pytest.raises(lp.PrunerError, match="at least 44 calibration samples"):
        lp.search(model, graph, scores, ids[:40], kinds=["neurons"], target_params=0.8)
    graph = graph.copy()
    for unit in graph.of_kind("heads"):
        unit.flags = frozenset({"norm"})
    with pytest.raises(lp.PrunerError, match="removing heads of LlamaForCausalLM is not the same as zeroing"):
        lp.search(model, graph, scores, ids, kinds=["heads"], target_params=0.9)
    assert PruneArguments(model="m").search_generations == allocation.GENERATIONS


def test_layers_and_kinds_may_be_any_iterable(setting, tmp_path):
    plans = [
        search(setting, kinds=kinds, layers=layers, target_params=0.9, generations=1)
        for kinds, layers in (([*["neurons"]], [1, 2]), (iter(["neurons"]), iter([1, 2])), (["neurons"], range(1, 3)))
    ]
    assert plans[0].key == plans[1].key == plans[2].key
    for plan in plans:
        plan.save(tmp_path / "plan.json")
        assert lp.PruningPlan.load(tmp_path / "plan.json").settings["layers"] == {"neurons": [1, 2]}
