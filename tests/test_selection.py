"""Plans made from scores, and plans as files."""

import json
from contextlib import suppress

import numpy as np
import pytest
import torch
from helpers.models import build

import llm_pruner as lp
from llm_pruner.selection.budgets import parameters
from llm_pruner.selection.compose import scores_in_original
from llm_pruner.selection.ranking import removable_count


@pytest.fixture(scope="module")
def setting():
    model = build("llama_grouped")
    graph = lp.trace(model)
    return graph, lp.score(model, graph, criterion="random", seed=3)


def test_a_unit_loses_as_many_indices_as_in_llm_pruner(setting):
    graph, _ = setting
    neurons, heads = graph.unit("model.layers.0.mlp.neurons"), graph.unit("model.layers.0.self_attn.heads")
    assert [removable_count(neurons, r) for r in (0.1, 0.25, 0.34, 0.5)] == [
        48 - int(48 * (1 - r)) for r in (0.1, 0.25, 0.34, 0.5)
    ]
    assert [removable_count(heads, r) for r in (0.25, 0.43, 0.5, 0.99)] == [0, 0, 1, 1]


def test_the_lowest_scores_go_and_layers_are_respected(setting):
    graph, scores = setting
    plan = lp.select(graph, scores, 0.5, layers=[1])
    assert set(plan.units) == {"model.layers.1.mlp.neurons", "model.layers.1.self_attn.heads"}
    kept = plan.units["model.layers.1.mlp.neurons"].kept
    values = scores.values["model.layers.1.mlp.neurons"]
    assert kept.tolist() == sorted(values.argsort()[24:].tolist())
    assert plan.kept["model.layers.1.mlp.down_proj.weight"][1].tolist() == kept.tolist()
    by_kind = lp.select(graph, scores, 0.5, layers={"neurons": [0], "heads": [2]})
    assert set(by_kind.units) == {"model.layers.0.mlp.neurons", "model.layers.2.self_attn.heads"}


def test_global_scope_ranks_across_layers(setting):
    graph, scores = setting
    plan = lp.select(graph, scores, 0.5, kinds=["neurons"], scope="global")
    removed = sum(c.size - c.kept.numel() for c in plan.units.values())
    assert removed == 3 * 24
    cut = torch.cat([scores.values[u.name] for u in graph.of_kind("neurons")]).sort().values[removed]
    for name, choice in plan.units.items():
        assert bool((scores.values[name][choice.kept] >= cut).all())


@pytest.mark.parametrize("scope", ["local", "global"])
def test_round_to_keeps_multiples(setting, scope):
    graph, scores = setting
    plan = lp.select(graph, scores, 0.4, kinds=["neurons"], scope=scope, round_to=8)
    assert all(c.kept.numel() % 8 == 0 for c in plan.units.values())


def test_units_too_small_to_lose_an_index_are_noted(setting):
    graph, scores = setting
    plan = lp.select(graph, scores, 0.25)
    assert any("heads: 3 of 3 units lose nothing" in note for note in plan.notes)
    with pytest.raises(lp.PrunerError, match="removes nothing"):
        lp.select(graph, scores, 0.25, kinds=["heads"])


def test_as_many_experts_stay_as_the_router_selects():
    model = build("mixtral")
    graph = lp.trace(model)
    plan = lp.select(graph, lp.score(model, graph, criterion="l1"), 0.99, kinds=["experts"])
    assert {c.kept.numel() for c in plan.units.values()} == {2}


def test_the_same_inputs_give_the_same_plan_file(setting, tmp_path):
    graph, scores = setting
    for name in ("a", "b"):
        lp.select(graph, scores, 0.5).save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_plan_comes_back_from_its_file(setting, tmp_path):
    graph, scores = setting
    plan = lp.select(graph, scores, 0.5, kinds=["heads", "neurons", "query_heads", "hidden"])
    plan.save(tmp_path / "plan.json")
    back = lp.PruningPlan.load(tmp_path / "plan.json")
    assert back.settings == plan.settings and back.notes == plan.notes and back.shapes == plan.shapes
    assert back.kept.keys() == plan.kept.keys()
    for name, dims in plan.kept.items():
        assert all(torch.equal(kept, back.kept[name][dim]) for dim, kept in dims.items())
        assert all(torch.equal(kept, kept.sort().values) for kept in dims.values())
    assert all(torch.equal(c.kept, back.units[n].kept) for n, c in plan.units.items())


def test_removed_indices_score_lowest_in_the_next_step(setting):
    graph, scores = setting
    plan = lp.select(graph, scores, 0.25, kinds=["neurons"])
    name, choice = next(iter(plan.units.items()))
    again = scores_in_original(lp.Scores({name: torch.arange(36.0).double()}), graph, plan).values[name]
    assert torch.isinf(again).sum() == 12 and torch.equal(again[choice.kept], torch.arange(36.0).double())


def test_layers_may_be_any_iterable_and_must_name_known_kinds(setting):
    plans = [
        lp.select(*setting, 0.5, layers=layers)
        for layers in ([0, 1], iter([0, 1]), {"heads": iter([0, 1]), "neurons": range(2)})
    ]
    assert plans[0].units.keys() == plans[1].units.keys() == plans[2].units.keys()
    assert (
        lp.select(*setting, 0.5, kinds="heads").units.keys() == lp.select(*setting, 0.5, kinds=["heads"]).units.keys()
    )
    with pytest.raises(lp.PrunerError, match="kind 'head', which is not valid"):
        lp.select(*setting, 0.5, layers={"head": [1]})


def test_scores_of_another_model_are_refused(setting):
    graph, scores = setting
    with pytest.raises(lp.PrunerError, match="no scores"):
        lp.select(lp.trace(build("llama")), scores, 0.5)
    with pytest.raises(lp.PrunerError, match="no scores"):
        lp.select(graph, lp.Scores({}), 0.5)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"ratio": 0}, "out of range"),
        ({"ratio": 1.0}, "out of range"),
        ({"ratio": -0.1}, "out of range"),
        ({"ratio": float("nan")}, "out of range"),
        ({"kinds": ["head"]}, "choose from"),
        ({"scope": "both"}, "choose from local, global"),
        ({"round_to": 0}, "1 or more"),
        ({"layers": [3]}, "layers 0 to 2"),
        ({"layers": 1}, r"such as \[1\]"),
        ({"layers": {"neurons": 1}}, r"such as \[1\]"),
        ({"kinds": ()}, "no kind of unit is named: choose from heads"),
        ({"kinds": [], "target_params": 0.8}, "no kind of unit is named"),
        ({"ratio": {}, "target_params": 0.8}, "no kind of unit is named"),
        ({"kinds": ["experts"]}, "nothing to prune"),
    ],
)
def test_bad_arguments(setting, bad, message):
    with pytest.raises(lp.PrunerError, match=message):
        lp.select(*setting, **({"ratio": 0.5} | bad))
    experts = build("mixtral")
    scored = lp.trace(experts), lp.score(experts, lp.trace(experts), criterion="l1")
    with pytest.raises(lp.PrunerError, match="multiples of 8 only"):
        lp.select(*scored, counts={"neurons": 33})
    with pytest.raises(lp.PrunerError, match="give 1 to 3"):
        lp.select(*setting, counts={"layers": 4})


def test_damaged_plans_are_refused(setting, tmp_path):
    path = tmp_path / "plan.json"
    lp.select(*setting, 0.5).save(path)
    good = json.loads(path.read_text())
    for change, message in (
        ({"format": "other"}, "not a pruning plan"),
        ({"version": 9}, "version 9"),
        ({"positions": ["5-3,1"] * 9}, "damaged"),
        ({"positions": ["0-99999"] * 9}, "damaged"),
        ({"parameters": {"x": {"shape": [3]}}}, "damaged"),
        ({"parameters": {"x": {"shape": [3], "kept": {"0": -1}}}}, "damaged"),
        ({"units": {"x": {"kind": "heads", "layer": 0, "size": 2, "kept": "0-5"}}}, "damaged"),
    ):
        path.write_text(json.dumps(good | change))
        with pytest.raises(lp.PrunerError, match=message):
            lp.PruningPlan.load(path)
    path.write_text("{")
    with pytest.raises(lp.PrunerError, match="cannot read"):
        lp.PruningPlan.load(path)
    with pytest.raises(lp.PrunerError, match="cannot read"):
        lp.PruningPlan.load(tmp_path / "none.json")


@pytest.mark.parametrize("scope", ("local", "global"))
@pytest.mark.parametrize("target", (0.9, "0.8", "0.735", "45K", 40_000))
def test_a_target_is_hit_from_below(target, scope):
    model = build("llama", intermediate_size=300)
    graph = lp.trace(model)
    whole = sum(p.numel() for p in model.parameters())
    scores = lp.score(model, graph, criterion="random")
    kinds = ("neurons",) if scope == "global" else ("heads", "neurons")  # a head is 1% of so small a model
    plan = lp.select(graph, scores, kinds=kinds, target_params=target, scope=scope)
    left = sum(p.numel() for p in lp.apply(model, plan).parameters())
    number = float(str(target).rstrip("K"))
    wanted = number * whole if number <= 1 else number * (1000 if str(target).endswith("K") else 1)
    assert wanted * 0.995 <= left <= wanted


def test_tied_parameters_count_once():
    model = build("gpt2")
    graph = lp.trace(model)
    plan = lp.select(graph, lp.score(model, graph, criterion="random"), kinds=["neurons"], target_params=0.9)
    left = sum(p.numel() for p in lp.apply(model, plan).parameters())
    assert left <= 0.9 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (0.2, "cannot be reached"),
        ("9B", "give less"),
        (1.0, "give less"),
        ("many", "use a fraction"),
        ("-3", "use a fraction"),
        (0.99999, "cannot be met"),
    ],
)
def test_targets_that_cannot_be(target, message):
    model = build("llama")
    graph = lp.trace(model)
    with pytest.raises(lp.PrunerError, match=message):
        lp.select(graph, lp.score(model, graph, criterion="random"), kinds=["heads"], target_params=target)


def test_global_scores_are_per_parameter():
    """Among neurons of equal score, those that free more parameters are removed first."""
    model = build("llama")
    graph = lp.trace(model)
    one, two, *_ = graph.of_kind("neurons")
    scores = lp.Scores({u.name: torch.ones(u.size, dtype=torch.float64) for u in graph.units})
    for key in list(two.dims)[:1]:  # as if the second layer's neurons had a third less to them
        del two.dims[key]
    plan = lp.select(graph, scores, 0.3, kinds=["neurons"], scope="global")
    assert plan.units[one.name].kept.numel() < one.size and two.name not in plan.units


@pytest.mark.parametrize(("normalize", "spared"), [("none", True), ("mean", False), ("sqrt", True)])
def test_normalised_scores_compare_layers(normalize, spared):
    """A layer whose scores are a thousand times larger is spared, unless each is measured by its own mean."""
    graph = lp.trace(build("llama"))
    units = graph.of_kind("neurons")
    values = {u.name: torch.arange(1, u.size + 1, dtype=torch.float64) for u in units}
    values[units[0].name] *= 1000
    plan = lp.select(graph, lp.Scores(values), 0.25, kinds=["neurons"], scope="global", normalize=normalize)
    assert (units[0].name not in plan.units) == spared
    if not spared:
        assert {c.kept.numel() for c in plan.units.values()} == {36}


@pytest.mark.parametrize("scope", ("local", "global"))
def test_a_floor_under_every_unit(scope):
    graph = lp.trace(build("llama"))
    scores = lp.score(build("llama"), graph, criterion="random")
    plan = lp.select(graph, scores, 0.6, kinds=["neurons"], scope=scope, floor=0.5)
    assert min(c.kept.numel() for c in plan.units.values()) == 24
    with pytest.raises(lp.PrunerError, match="out of range"):
        lp.select(graph, scores, 0.6, floor=1)
    with pytest.raises(lp.PrunerError, match="choose from none, mean, sqrt"):
        lp.select(graph, scores, 0.6, normalize="median")


@pytest.mark.parametrize("scope", ("local", "global"))
def test_widths_that_kernels_like(scope):
    model = build("llama", intermediate_size=512)
    graph = lp.trace(model)
    scores = lp.score(model, graph, criterion="random")
    plan = lp.select(graph, scores, 0.3, scope=scope, align=True)
    kept = {kind: {c.kept.numel() for c in plan.units.values() if c.kind == kind} for kind in ("neurons", "heads")}
    assert all(count % 16 == 0 for count in kept["neurons"]) and kept["neurons"]
    assert kept["heads"] & {3}, "heads are not rounded"
    size = parameters(graph, lp.select(graph, scores, 0.3, kinds=["neurons"], align=True))
    solved = lp.select(graph, scores, kinds=["neurons"], target_params=size, align=True)
    assert all(c.kept.numel() % 16 == 0 for c in solved.units.values()) and not solved.notes
    # Widths of one multiple cannot leave this much; the largest smaller power of two that can is taken.
    between = lp.select(graph, scores, kinds=["neurons"], target_params=size + 700, align=True)
    (note,) = (note for note in between.notes if note.startswith("widths are "))
    counts = {c.kept.numel() for c in between.units.values()}
    if "not aligned" in note:
        assert any(count % 8 for count in counts)
    else:
        assert "multiples of 8 at most" in note and all(count % 8 == 0 for count in counts)


@pytest.mark.parametrize("scope", ("local", "global"))
def test_devices_keep_equal_parts(scope):
    model = build("llama_grouped", intermediate_size=96, num_attention_heads=8, num_key_value_heads=4)
    graph = lp.trace(model)
    scores = lp.score(model, graph, criterion="random")
    plan = lp.select(graph, scores, 0.5, scope=scope, tensor_parallel=4)
    assert {c.kind for c in plan.units.values()} >= {"neurons"}
    for name, choice in plan.units.items():
        width = choice.size // 4
        each = [choice.kept[choice.kept // width == part] for part in range(4)]
        assert len({len(part) for part in each}) == 1
        for part, kept in enumerate(each):  # and of each part the best stay
            best = scores.values[name][part * width : (part + 1) * width].topk(len(kept)).indices + part * width
            assert torch.equal(best.sort().values, kept)
    # Cut into four as vLLM cuts it, the pruned weight's parts are the pruned parts of the weight.
    pruned = lp.apply(model, plan)
    for layer, original in zip(pruned.model.layers, model.model.layers, strict=True):
        for small, large in zip(layer.mlp.up_proj.weight.chunk(4), original.mlp.up_proj.weight.chunk(4), strict=True):
            assert all(any(torch.equal(row, other) for other in large) for row in small)
    odd = lp.select(graph, scores, 0.5, tensor_parallel=3)
    assert any("4 indices, which 3 devices cannot share" in note for note in odd.notes)
    with pytest.raises(lp.PrunerError, match="tensor_parallel 0 is out of range"):
        lp.select(graph, scores, 0.5, tensor_parallel=0)


def test_counted_kinds_keep_to_the_layers_too(setting):
    graph, scores = setting
    both = lp.select(graph, scores, {"neurons": 0.5}, counts={"heads": 1}, layers=[1])
    assert {choice.layer for choice in both.units.values()} == {1} and len(both.units) == 2
    assert sorted(both.settings["kinds"]) == ["heads", "neurons"]
    one = lp.select(graph, scores, kinds="neurons", counts={"heads": 1}, layers=[1], target_params=0.93)
    assert {choice.layer for choice in one.units.values()} == {1} and len(one.units) == 2
    with pytest.raises(lp.PrunerError, match="kind 'head' is not valid"):
        lp.select(graph, scores, {"head": 0.5}, counts={"neurons": 24})


@pytest.mark.parametrize("options", [{"round_to": 8}, {"tensor_parallel": 2}])
@pytest.mark.parametrize("uniform", [True, False])
def test_indices_that_must_stay_leave_equal_parts_and_multiples(setting, options, uniform):
    graph, scores = setting
    values = dict(scores.values)
    first = graph.of_kind("neurons")[0]
    values[first.name] = values[first.name].index_fill(0, torch.arange(21), torch.inf)
    plans = []
    total = parameters(graph)
    for removed in range(576, 8000, 576):  # so many parameters hold two neurons of each layer
        with suppress(lp.PrunerError):  # steps of 8 do not meet all
            share = 1 - removed / total
            plans.append(
                lp.select(graph, lp.Scores(values), kinds="neurons", target_params=share, uniform=uniform, **options)
            )
    choices = [choice for plan in plans for choice in plan.units.values()]
    assert len(choices) > 3 and all(plan.units[first.name].kept[:21].tolist() == [*range(21)] for plan in plans)
    for choice in choices:
        if "round_to" in options:
            assert len(choice.kept) % 8 == 0
        else:
            assert (choice.kept < 24).sum() == (choice.kept >= 24).sum()
    assert not uniform or all(len({len(choice.kept) for choice in plan.units.values()}) == 1 for plan in plans)


@pytest.mark.parametrize(
    "options",
    [
        {"layers": np.arange(1, 3)},
        {"layers": torch.arange(1, 3)},
        {"ratio": np.float32(0.5), "floor": torch.tensor(0.25), "round_to": np.int64(2)},
        {"counts": {"neurons": np.int64(24)}},
    ],
)
def test_plans_with_numbers_of_other_libraries_are_written(setting, options, tmp_path):
    plan = lp.select(*setting, **({"ratio": 0.5, "kinds": ["neurons"]} | options))
    plan.save(tmp_path / "plan.json")
    loaded = lp.PruningPlan.load(tmp_path / "plan.json", verify=True)
    assert loaded.key == plan.key and loaded.settings.get("layers") in (None, {"neurons": [1, 2]})
    plan.settings["model"] = plan
    with pytest.raises(lp.PrunerError, match="settings of the plan cannot be written"):
        plan.save(tmp_path / "other.json")


def test_layers_are_whole_numbers(setting):
    with pytest.raises(lp.PrunerError, match="layers are not valid"):
        lp.select(*setting, 0.5, layers=[1.5])
