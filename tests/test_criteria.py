"""Criteria from outside: functions, ``package.module:function``, torch-pruning's importances."""

import json
import sys

import pytest
import torch
from helpers.models import build, tokens
from torch_pruning.pruner import importance as tp

import llm_pruner as lp
from llm_pruner.cli import main
from llm_pruner.importance.criteria import CRITERIA, check_criterion

WIDTHS = ("heads", "neurons")
MODULE = '''
import torch

def largest(request):
    """Scores per unit: indices at the end are worth more."""
    return {unit.name: torch.arange(unit.size).double() for unit in request.units}

number = 3
'''


@pytest.fixture
def registry(monkeypatch):
    """The registry, restored afterwards."""
    saved = dict(CRITERIA)
    yield CRITERIA
    CRITERIA.clear()
    CRITERIA.update(saved)


@pytest.fixture
def own_module(registry, tmp_path, monkeypatch):
    """A module in the current directory, which is not in ``sys.path`` (as for the installed command)."""
    (tmp_path / "own_criteria.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    monkeypatch.delitem(sys.modules, "own_criteria", raising=False)
    yield "own_criteria"
    sys.modules.pop("own_criteria", None)


@pytest.fixture(scope="module")
def llama():
    model = build("llama_grouped")
    return model, lp.trace(model)


def squares(request):
    """``l2`` by hand, as numbers per channel."""
    weights = dict(request.weights)
    numbers = {}
    for name, dims in request.dims.items():
        for dim in dims:
            channels = weights[name].detach().square().movedim(dim, 0)
            numbers[name, dim] = channels.reshape(len(channels), -1).sum(1)
    return numbers


@pytest.mark.parametrize("aggregation", ["sum", "max"])
def test_numbers_per_channel_are_aggregated_like_built_in_ones(llama, aggregation):
    own, built_in = (lp.score(*llama, criterion=c, aggregation=aggregation) for c in (squares, "l2"))
    assert own.values.keys() == built_in.values.keys() and own.settings["criterion"] == "squares"
    for name, values in built_in.values.items():
        torch.testing.assert_close(own.values[name], values)


def test_scores_per_unit_are_taken_as_they_are(llama, registry):
    def ascending(request):
        assert request.tokens.shape == (2, 12) and request.seed == 7
        return {unit.name: torch.arange(unit.size, dtype=torch.float32) for unit in request.units}

    lp.register_criterion("ascending", ascending)
    model, graph = llama
    scores = lp.score(model, graph, tokens(), "ascending", kinds=WIDTHS, seed=7)
    assert all(values.tolist() == list(range(len(values))) for values in scores.values.values())
    plan = lp.select(graph, scores, ratio=0.5, kinds=["neurons"])
    assert plan.units["model.layers.0.mlp.neurons"].kept.tolist() == list(range(24, 48))


def test_scores_that_units_share_can_be_saved(llama, tmp_path):
    row = torch.arange(96).double()[::2]
    scores = lp.score(*llama, criterion=lambda request: {unit.name: row for unit in request.units}, kinds=["neurons"])
    scores.save(tmp_path / "scores")
    saved = lp.Scores.load(tmp_path / "scores").values
    assert len(saved) > 1 and all(torch.equal(values, row) for values in saved.values())


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda units: None, "criterion 'own' returned NoneType: return"),
        (lambda units: {3: torch.zeros(3)}, "criterion 'own' returned keys such as 3"),
        (lambda units: {}, r"returned nothing for unit model\.layers\.0\.mlp\.neurons"),
        (lambda units: {u.name: torch.zeros(u.size) for u in units[1:]}, r"nothing for unit model\.layers\.0\.mlp"),
        (lambda units: {u.name: torch.zeros(3) for u in units}, r"\[3\] for unit model\.layers\.0\.mlp.*tensor \[48\]"),
        (lambda units: {u.name: [0.0] * u.size for u in units}, r"returned list for unit .*a tensor \[48\]"),
        (lambda units: {u.name: torch.full((u.size,), torch.nan) for u in units}, "returned NaN for unit model"),
        (
            lambda units: {("model.layers.0.mlp.up_proj.weight", 0): torch.zeros(32)},
            r"\[32\] for model\.layers\.0\.mlp\.up_proj\.weight dim 0 of unit .*a tensor \[48\]",
        ),
        (
            lambda units: {key: torch.full((48,), torch.inf) for u in units for key in u.dims},
            r"criterion 'own': the scores of model\.layers\.0\.mlp\.neurons are not finite",
        ),
    ],
)
def test_results_that_are_no_scores_are_refused(llama, registry, returned, message):
    lp.register_criterion("own", lambda request: returned(request.units))
    with pytest.raises(lp.PrunerError, match=message):
        lp.score(*llama, criterion="own", kinds=["neurons"])


def test_numbers_of_own_criteria_are_not_cached(llama, tmp_path):
    lp.score(*llama, criterion=squares, cache=tmp_path / "own")
    lp.score(*llama, criterion="l2", cache=tmp_path / "built-in")
    assert [path.name for path in tmp_path.iterdir()] == ["built-in"]


@pytest.mark.parametrize("name", ["taylor", "random", "block_influence"])
def test_built_in_names_are_taken(registry, name):
    with pytest.raises(lp.PrunerError, match=f"{name!r} is taken by a built-in criterion"):
        lp.register_criterion(name, squares)


def test_only_functions_are_registered(registry):
    with pytest.raises(lp.PrunerError, match="'own' is int, not a function"):
        lp.register_criterion("own", 3)
    with pytest.raises(lp.PrunerError, match=r"'own' is a class: give an instance, LAMPImportance\(\)"):
        lp.register_criterion("own", tp.LAMPImportance)


def test_a_module_of_the_current_directory_is_imported(own_module):
    path = list(sys.path)
    assert check_criterion("own_criteria:largest") == "own_criteria:largest"
    assert sys.path == path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent_module:largest", "there is no module absent_module; run the command in the folder that holds it"),
        ("own_criteria.deeper:largest", "there is no module own_criteria.deeper"),
        ("own_criteria:smallest", r"module own_criteria \(.*own_criteria\.py\) has no 'smallest'"),
        ("own_criteria:number", "is int, not a function"),
        ("broken:largest", "importing broken failed: No module named 'absent_module'"),
        ("invalid:largest", "importing invalid failed: SyntaxError"),
        (":largest", "importing  failed"),
    ],
)
def test_modules_that_hold_no_criterion_are_refused(own_module, tmp_path, name, message):
    (tmp_path / "broken.py").write_text("import absent_module\n")
    (tmp_path / "invalid.py").write_text("def largest(request: return\n")
    with pytest.raises(lp.PrunerError, match=message):
        check_criterion(name)


SMALL = ["--preset", "paper", "--num_examples", "2", "--calib_seq_len", "16", "--eval_datasets", ""]


def test_a_command_takes_a_function_by_its_module(own_module, home, tmp_path):
    argv = ["prune", str(home / "base"), "out", "--pruner_type", "own_criteria:largest", "--kinds", "neurons", *SMALL]
    ranges = ["--block_mlp_layer_start", "0", "--block_mlp_layer_end", "3"]
    assert main([*argv, *ranges, "--pruning_ratio", "0.5"]) == 0
    plan = lp.PruningPlan.load(tmp_path / "out" / "pruning_plan.json")
    assert plan.units["model.layers.1.mlp.neurons"].kept.tolist() == list(range(32, 64))
    assert plan.settings["criterion"] == "own_criteria:largest"


def test_a_command_names_the_criterion_that_it_cannot_import(own_module, home, capsys):
    assert main(["prune", str(home / "base"), "out", "--pruner_type", "own_criteria:smallest", *SMALL]) == 2
    assert "own_criteria:smallest" in capsys.readouterr().err


SWEEP = """model: {home}/base
output: {out}
evaluate: {{datasets: {home}/text.txt, seq_len: 32, max_windows: 4}}
stages:
  - prune:
      kinds: [neurons]
      block_mlp_layer_start: 0
      block_mlp_layer_end: 3
      num_examples: 2
      calib_seq_len: 16
      preset: paper
      hardware_align: false
sweep:
  grid:
    prune.pruner_type: ["own_criteria:largest"]
"""


@pytest.mark.slow
def test_a_sweep_takes_a_function_by_its_module(own_module, home, home_text, tmp_path):
    (tmp_path / "sweep.yaml").write_text(SWEEP.format(home=home, out=tmp_path / "out"))
    assert main(["run", "sweep.yaml"]) == 0
    (plan,) = [lp.PruningPlan.load(path) for path in (tmp_path / "out").rglob("pruning_plan.json")]
    assert plan.units["model.layers.1.mlp.neurons"].kept.tolist() == list(range(32, 64))
    rows = json.loads((tmp_path / "out" / "results.json").read_text())
    assert "own_criteria:largest" in {row.get("prune.pruner_type") for row in rows}


PAIRS = [
    (tp.GroupMagnitudeImportance(p=1, group_reduction="sum", normalizer=None), {"criterion": "l1"}),
    (tp.MagnitudeImportance(p=2, group_reduction="sum", normalizer=None), {"criterion": "l2"}),
    (tp.TaylorImportance(group_reduction="sum", normalizer=None), {"taylor": "param_first"}),
    (tp.TaylorImportance(group_reduction="sum", normalizer=None, multivariable=True), {"taylor": "vectorize"}),
    (tp.HessianImportance(group_reduction="sum", normalizer=None), {"taylor": "param_second"}),
]


@pytest.mark.parametrize(("importance", "ours"), PAIRS, ids=["-".join(ours.values()) for _, ours in PAIRS])
@pytest.mark.parametrize("family", ["llama", "llama_grouped", "gpt2"])
def test_torch_pruning_agrees_where_the_formulas_do(family, importance, ours):
    model, ids = build(family), tokens(3, 10)
    graph = lp.trace(model)
    scores = lp.score(model, graph, ids, importance, kinds=WIDTHS).values
    expected = lp.score(model, graph, ids, kinds=WIDTHS, **ours).values
    assert scores.keys() == expected.keys() and len(scores) == 6
    for name, values in expected.items():
        torch.testing.assert_close(scores[name], values, rtol=1e-5, atol=0, msg=name)


@pytest.mark.parametrize("reduction", ["mean", "max", "prod", "first"])
def test_reductions_of_torch_pruning_are_our_aggregations(reduction):
    """One member per slice where every head has its own keys."""
    model = build("llama")
    graph = lp.trace(model)
    importance = tp.MagnitudeImportance(p=2, group_reduction=reduction, normalizer=None)
    scores = lp.score(model, graph, None, importance, kinds=WIDTHS).values
    for name, values in lp.score(model, graph, None, "l2", kinds=WIDTHS, aggregation=reduction).values.items():
        torch.testing.assert_close(scores[name], values, rtol=1e-5, atol=0, msg=name)


@pytest.mark.parametrize(
    "importance",
    [
        tp.LAMPImportance(),
        tp.FPGMImportance(),
        tp.RandomImportance(),
        tp.OBDCImportance(),
        tp.TaylorImportance(bias=True),
    ],
    ids=lambda importance: type(importance).__name__,
)
@pytest.mark.parametrize("family", ["llama_grouped", "gpt2"])
def test_every_class_of_torch_pruning_scores_heads_and_neurons(family, importance):
    model, ids = build(family), tokens(3, 10)
    graph = lp.trace(model)
    first, again = (lp.score(model, graph, ids, importance, kinds=WIDTHS).values for _ in range(2))
    assert first.keys() == {unit.name for unit in graph.of_kind(*WIDTHS)}
    for name, values in first.items():
        assert values.isfinite().all() and values.std() > 0 and torch.equal(values, again[name])


def test_obdc_weighs_rows_by_their_squared_gradients():
    model, ids = build("llama"), tokens(3, 10)
    graph = lp.trace(model)
    importance = tp.OBDCImportance(group_reduction="first", normalizer=None)
    scores = lp.score(model, graph, ids, importance, kinds=["neurons"]).values
    expected = lp.score(model, graph, ids, taylor="param_second", aggregation="first", kinds=["neurons"]).values
    for name, values in expected.items():
        torch.testing.assert_close(scores[name], values, rtol=1e-4, atol=1e-8, msg=name)


class Spread(tp.Importance):
    """A class of a user: how far the weights of a channel lie from their mean, over all members."""

    def __call__(self, group):
        total = torch.zeros(len(group[0].root_idxs))
        for item in group:
            weight = item.dep.layer.weight if isinstance(item.dep.layer, torch.nn.Module) else item.dep.layer
            rows = weight.movedim(item.dep.target.pruning_dim, 0)[item.idxs].flatten(1)
            total[item.root_idxs] += (rows - rows.mean(1, keepdim=True)).abs().sum(1).detach()
        return total


def test_a_users_subclass_sees_every_slice():
    model = build("llama_grouped")
    graph = lp.trace(model)
    scores = lp.score(model, graph, None, Spread(), kinds=WIDTHS)
    weights = dict(model.named_parameters())
    for unit in graph.of_kind(*WIDTHS):
        total = 0
        for name, dim in unit.dims:
            rows = weights[name].detach().movedim(dim, 0).flatten(1)
            channels = (rows - rows.mean(1, keepdim=True)).abs().sum(1)
            total = total + channels[unit.positions(name, dim)].sum(1)
        torch.testing.assert_close(scores.values[unit.name], total.double(), rtol=1e-5, atol=0)


def test_torch_pruning_leaves_the_model_as_it_was():
    model = build("gpt2").train()
    model.transformer.wte.weight.requires_grad_(False)
    kept = torch.ones_like(model.transformer.h[0].mlp.c_fc.weight)
    model.transformer.h[0].mlp.c_fc.weight.grad = kept
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    importance = tp.HessianImportance()
    state = torch.get_rng_state()
    lp.score(model, lp.trace(model), tokens(), importance, kinds=WIDTHS)
    assert torch.equal(torch.get_rng_state(), state) and importance._accu_grad == {}
    assert model.training and not model.transformer.wte.weight.requires_grad
    assert model.transformer.h[0].mlp.c_fc.weight.grad is kept and model.transformer.ln_f.weight.grad is None
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_units_that_torch_pruning_cannot_express_are_refused_or_left_out():
    model = build("mixtral")
    graph = lp.trace(model)
    for kind in ("neurons", "layers", "vocabulary"):
        with pytest.raises(lp.PrunerError, match=r"MagnitudeImportance does not score .*target_types"):
            lp.score(model, graph, None, tp.MagnitudeImportance(), kinds=[kind])
    scores = lp.score(model, graph, None, tp.MagnitudeImportance())
    assert (
        "model.layers.0.self_attn.heads" in scores.values and "model.layers.0.mlp.experts.neurons" not in scores.values
    )
    with pytest.raises(lp.PrunerError, match="BNScaleImportance does not score"):
        lp.score(model, graph, None, tp.BNScaleImportance(), kinds=["heads"])


def test_gradients_need_a_calibration_set(llama):
    with pytest.raises(lp.PrunerError, match="needs a calibration set"):
        lp.score(*llama, criterion=tp.TaylorImportance(), kinds=["neurons"])
