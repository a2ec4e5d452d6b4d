"""Displays of graphs, scores, plans and runs: as text, in a notebook, and drawn."""

import re
from pathlib import Path

import pytest
import torch
from helpers.models import ARCHITECTURES, build

import llm_pruner as lp
from llm_pruner.display import plot_shares
from llm_pruner.errors import PrunerError
from llm_pruner.pruning.run import PruneRun

LONGEST = 200  # characters of a line


@pytest.fixture(scope="module")
def objects():
    """Graph, scores, plan and run of a model, by name."""
    model = build("mixtral")
    graph = lp.trace(model)
    kinds = ("heads", "neurons", "experts", "hidden", "layers")
    scores = lp.score(model, graph, criterion="l1", kinds=("heads", "neurons", "experts", "hidden"))
    scores.values["model.layers.layers"] = torch.tensor([3.0, 1.0, 2.0]).double()
    plan = lp.select(graph, scores, 0.5, kinds)
    plan.settings["base_model"] = "mixtral"
    sizes = {"parameters_before": 71_000, "parameters_after": 35_500}
    text = {"general": {"perplexity": 20.0855, "tokens": 4096}}
    metrics = sizes | {"before": {"perplexity": text}, "after": {"perplexity": text}, "arguments": {"model": "mixtral"}}
    run = PruneRun(model=model, tokenizer=None, plan=plan, metrics=metrics, folder=Path("smaller"))
    return {"graph": graph, "scores": scores, "plan": plan, "run": run}


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("graph", ["CouplingGraph of MixtralForCausalLM: 71.3 k parameters", "3 x 48 neurons", "1 x 32 hidden"]),
        ("scores", ["Scores by l1", "144 neurons in 3 units"]),
        ("plan", ["PruningPlan of mixtral: removes ", "1 of 3 layers kept in 1 unit", "16 of 32 hidden kept"]),
        (
            "run",
            [
                "PruneRun of mixtral as MixtralForCausalLM: 71.0 k -> 35.5 k parameters (50.0%)",
                "perplexity, general (4,096 tokens): 20.09 -> 20.09",
                "folder: smaller",
            ],
        ),
    ],
)
def test_representations_are_short_and_say_what_the_object_holds(name, parts, objects):
    text = repr(objects[name])
    assert all(part in text for part in parts), text
    lines = text.splitlines()
    assert len(lines) <= 8 and max(map(len, lines)) <= LONGEST
    html = objects[name]._repr_html_()
    assert html.count("<table>") == html.count("</table>") == (2 if name == "run" else 1)
    rows = [len(re.findall("<t[hd]", row)) for row in html.split("<tr>")[1:]]
    assert set(rows[1:]) <= {rows[0], rows[-1]} and "tensor" not in html


def test_an_empty_plan_and_no_scores_have_a_representation():
    assert repr(lp.PruningPlan()) == "PruningPlan: removes 0 parameters"
    assert repr(lp.Scores({})) == "Scores by unknown criterion: none"
    for empty in (lp.PruningPlan(), lp.Scores({})):
        with pytest.raises(PrunerError, match="nothing to plot"):
            empty.plot()


def test_html_is_escaped(objects):
    plan = lp.PruningPlan(settings={"base_model": "<script>"}, notes=["a < b"])
    assert "<script>" not in plan._repr_html_() and "a &lt; b" in plan._repr_html_()


@pytest.fixture
def drawn():
    """Draw an object; its axes and the numbers of the grid by row and column."""
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="matplotlib is not installed")
    pyplot.switch_backend("Agg")

    def draw(shown):
        ax = shown.plot()
        columns = [label.get_text() for label in ax.get_xticklabels()]
        rows = [label.get_text() for label in ax.get_yticklabels()]
        grid = ax.images[0].get_array()
        cells = {(row, column): float(grid[y, x]) for y, row in enumerate(rows) for x, column in enumerate(columns)}
        return ax, {key: value for key, value in cells.items() if value == value}

    yield draw
    pyplot.close("all")


def test_a_plan_is_drawn_with_what_each_layer_keeps(drawn, objects):
    plan = objects["plan"]
    _, cells = drawn(plan)
    kept = plan.units["model.layers.layers"].kept.tolist()
    assert [cells["layers", str(i)] for i in range(3)] == [float(i in kept) for i in range(3)]
    assert cells["hidden", "all"] == 0.5
    for name, choice in plan.units.items():
        if choice.layer is not None:
            assert cells[choice.kind, str(choice.layer)] == choice.kept.numel() / choice.size, name
    removed = next(i for i in range(3) if i not in kept)
    assert cells["neurons", str(removed)] == 0.0


def test_layers_without_a_choice_are_drawn_whole(drawn):
    model = build("llama_grouped")
    graph = lp.trace(model)
    plan = lp.select(graph, lp.score(model, graph, criterion="l1"), 0.5, ["neurons"], layers=[1])
    plan.drop_block("model.layers.2.self_attn", graph.shapes)
    _, cells = drawn(plan)
    assert [cells["neurons", i] for i in "012"] == [1.0, 0.5, 1.0]
    assert [cells["self_attn", i] for i in "012"] == [1.0, 1.0, 0.0]
    _, of_run = drawn(PruneRun(model=None, tokenizer=None, plan=plan, metrics={}, folder=None))
    assert of_run == cells


def test_scores_are_drawn_as_shares_of_their_kind(drawn, objects):
    scores = objects["scores"]
    _, cells = drawn(scores)
    for kind in ("heads", "neurons", "experts", "layers"):
        assert sum(v for (row, _), v in cells.items() if row == kind) == pytest.approx(1.0)
    total = sum(scores.values[f"model.layers.{i}.mlp.experts.neurons"].sum() for i in range(3))
    assert cells["neurons", "1"] == pytest.approx(
        (scores.values["model.layers.1.mlp.experts.neurons"].sum() / total).item()
    )
    assert cells["layers", "0"] == pytest.approx(0.5)


def test_scores_that_are_not_finite_are_left_out(drawn):
    values = torch.tensor([float("inf"), 3.0, -float("inf")]).double()
    _, cells = drawn(lp.Scores({"h.0.heads": values, "h.1.heads": torch.tensor([1.0]).double()}))
    assert cells == {("heads", "0"): 0.75, ("heads", "1"): 0.25}
    assert lp.Scores({"h.0.heads": values}).table()[1] == ["heads", "1", "1", "3", "3", "3"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_graph_is_drawn_with_its_share_of_the_parameters(name, drawn):
    model = build(name)
    graph = lp.trace(model)
    ax, cells = drawn(graph)
    total = sum(tensor.numel() for tensor in model.parameters())
    layers = [sum(p.numel() for n, p in model.named_parameters() if f".{i}." in n) for i in range(3)]
    if name != "mixtral":  # whose experts have numbers too
        assert [cells["layers", str(i)] for i in range(3)] == pytest.approx([size / total for size in layers], rel=0.02)
    assert all(0 < value <= 1 for value in cells.values())
    assert ax.get_title().startswith(type(model).__name__)


def test_stacks_of_an_encoder_decoder_are_rows_of_their_own(drawn):
    scores = {
        f"{side}.block.{i}.mlp.neurons": torch.ones(4).double() for side in ("encoder", "decoder") for i in (0, 1)
    }
    _, cells = drawn(lp.Scores(scores))
    assert {row for row, _ in cells} == {"neurons, encoder.block", "neurons, decoder.block"}


def test_axes_of_the_user_are_drawn_in(objects):
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="matplotlib is not installed")
    pyplot.switch_backend("Agg")
    figure, axes = pyplot.subplots(2)
    assert objects["plan"].plot(axes[1]) is axes[1] and objects["scores"].plot(ax=axes[0]).figure is figure
    pyplot.close("all")


def test_plots_without_matplotlib_name_the_extra(monkeypatch):
    monkeypatch.setattr("llm_pruner.optional.find_spec", lambda name: None)
    with pytest.raises(PrunerError, match=r"plots need matplotlib: pip install \"llm_pruner\[report\]\""):
        plot_shares({"heads": {0: 1.0}}, title="", label="")
