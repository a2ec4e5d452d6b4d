"""The report, read as data and looked at in a browser."""

import json
import re
import shutil
from html.parser import HTMLParser

import pytest
import torch
from helpers.browser import browser_page

from llm_pruner.cli import main
from llm_pruner.importance.scores import Scores
from llm_pruner.report.arguments import ReportArguments
from llm_pruner.report.figures import draw_pruning, draw_tradeoffs, frontier
from llm_pruner.report.page import write_report
from llm_pruner.report.runs import MeasuredModel, Run, read
from llm_pruner.selection.plan import Choice, PruningPlan


@pytest.fixture(scope="module")
def runs(home, tmp_path_factory):
    """Folders of a pruning, a recovery and an evaluation of tiny models, each by its command."""
    folder = tmp_path_factory.mktemp("runs")
    short = ["--max_seq_len", "16", "--max_windows", "4", "--num_examples", "2", "--calib_seq_len", "16"]
    flags = ["--output_root", str(folder), "--save_model", "--pruning_ratio", "0.4", "--test_before_train"]
    flags += ["--test_after_train", "--pruner_type", "taylor", "--seed", "7", "--compensate", "none"]
    assert main(["prune", "--base_model", str(home / "base"), "--save_ckpt_log_name", "pruned", *flags, *short]) == 0
    flags = [
        "--data_path",
        str(home / "data.jsonl"),
        "--max_steps",
        "2",
        "--batch_size",
        "2",
        "--micro_batch_size",
        "2",
    ]
    flags += ["--extra_val_dataset", "python-docs", "--max_windows", "2", "--cutoff_len", "64", "--device", "cpu"]
    healed = str(folder / "healed")
    assert main(["recover", "--prune_model", str(folder / "pruned"), "--output_dir", healed, *flags]) == 0
    flags = ["--seq_len", "16", "--max_windows", "4", "--tokens", "16", "--new_tokens", "4", "--samples"]
    models = [str(home / "base"), str(folder / "pruned"), healed]
    assert main(["evaluate", *models, *flags, "--output", str(folder / "measured")]) == 0
    return [folder / name for name in ("pruned", "healed", "measured")]


def test_runs_are_read_as_data(runs):
    pruned, healed, measured = map(read, runs)
    assert [(m.model, m.stage) for m in pruned.models] == [("base", "original"), ("pruned", "pruned")]
    assert pruned.models[1].parameters < pruned.models[0].parameters
    assert pruned.plan is not None and pruned.scores is not None and pruned.about["seed"] == 7
    for name, choice in pruned.plan.units.items():  # the scores are those that the cut was made by
        scores = pruned.scores.values[name]
        assert scores[choice.kept].min().item() == choice.lowest_kept
    (point,) = healed.models
    assert point.parameters == pruned.models[1].parameters and "loss" in healed.curves
    (text,) = point.perplexity
    assert text == "python-docs, 254 tokens in 128s"
    assert [p.model for p in measured.models] == ["base", "pruned", "healed"]
    assert all(p.macs and p.latency and p.perplexity for p in measured.models)
    assert all(len(said) == 3 for said in measured.samples.values()) and len(measured.samples) == 3


def test_runs_of_older_versions_are_read(runs, tmp_path):
    """Their metrics name the model as base_model."""
    metrics = json.loads((runs[0] / "metrics.json").read_text())
    metrics["arguments"]["base_model"] = metrics["arguments"].pop("model")
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    assert [model.model for model in read(tmp_path).models] == ["base", tmp_path.name]


def test_perplexities_of_different_protocols_are_not_compared(runs):
    points = [point for folder in runs for point in read(folder).models]
    titles = [drawing.title for drawing in draw_tradeoffs(points)]
    assert any("60 tokens in 16s" in title for title in titles)
    assert not any("254" in title for title in titles), "a single point is no trade-off"


def test_the_frontier_is_what_nothing_beats():
    points = [(3, 10), (1, 30), (2, 40), (3, 12), (4, 10), (5, 5)]
    assert frontier(points, higher=False) == [(1, 30), (3, 10), (5, 5)]
    assert frontier([(x, -y) for x, y in points], higher=True) == [(1, -30), (3, -10), (5, -5)]


def test_figures_say_what_they_show(tmp_path):
    scores = torch.arange(1.0, 11.0).double()
    plan = PruningPlan(units={"layers.2.mlp.neurons": Choice("neurons", 2, 10, torch.arange(3, 10))})
    plan.units["layers.2.mlp.neurons"].explain(scores)
    run = Run("mine <b>", tmp_path, plan=plan, scores=Scores({"layers.2.mlp.neurons": scores}))
    (drawing,) = draw_pruning(run, "run0")
    assert "7 of 10 kept" in drawing.alt
    svg = drawing.svg()
    assert "<title>layer 2: 7 of 10 neurons kept</title>" in svg
    assert "3 of 10 removed (30%), kept from 4, removed up to 3" in svg
    assert draw_pruning(run, "run0")[0].svg() == svg, "the same figure is the same text"
    ids = re.findall(r'id="([^"]*)"', svg)
    assert len(ids) == len(set(ids)) and all(name.startswith("run0neurons-") for name in ids)


@pytest.mark.parametrize("values", [[0.0, 0.0, 1.0], [0.0, 0.0, 0.0], [-torch.inf, 2.0, 3.0], [-1.0, 0.5, 2.0]])
def test_odd_scores_can_be_drawn(values, tmp_path):
    scores = torch.tensor(values, dtype=torch.float64)
    plan = PruningPlan(units={"mlp": Choice("neurons", 0, 3, torch.tensor([1, 2]))})
    plan.units["mlp"].explain(scores)
    (drawing,) = draw_pruning(Run("odd", tmp_path, plan=plan, scores=Scores({"mlp": scores})), "run0")
    assert "<svg" in drawing.svg()


@pytest.mark.slow
def test_the_page_of_fifty_runs_stays_small(runs, tmp_path, capsys):
    """Runs of the embedded model's size: 30 layers of 1536 neurons."""
    generator = torch.Generator().manual_seed(0)
    metrics = json.loads((runs[0] / "metrics.json").read_text())
    folders = []
    for i in range(50):
        folder = tmp_path / f"run{i}"
        folder.mkdir()
        scores, plan = Scores({}), PruningPlan()
        for layer in range(30):
            name = f"model.layers.{layer}.mlp.neurons"
            scores.values[name] = torch.rand(1536, generator=generator, dtype=torch.float64)
            kept = scores.values[name].topk(1536 - 10 * (i + 1)).indices.sort().values
            plan.units[name] = Choice("neurons", layer, 1536, kept)
            plan.units[name].explain(scores.values[name])
        scores.save(folder / "importance.scores")
        plan.save(folder / "pruning_plan.json")
        metrics["parameters_after"] -= 1
        (folder / "metrics.json").write_text(json.dumps(metrics))
        folders.append(str(folder))
    arguments = ReportArguments(runs=folders, output=str(tmp_path / "page.html"))
    assert write_report(arguments) == tmp_path / "page.html"
    assert capsys.readouterr().out == f"{tmp_path / 'page.html'}\n"
    page = (tmp_path / "page.html").read_text()
    assert page.count('<svg class="figure"') >= 50 and len(page) <= 5 * 2**20


class Page(HTMLParser):
    """What a page asks the network for."""

    def __init__(self, text: str):
        super().__init__()
        self.asked: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = [v for n, v in attrs if n in ("src", "href", "xlink:href") and v]
        self.asked += [v for v in values if not v.startswith(("#", "data:"))]


def test_the_page_in_a_browser(runs, tmp_path):
    file = tmp_path / "page.html"
    flags = ["--output", str(file), "--figures", str(tmp_path / "figures"), "--title", "A & B"]
    assert main(["report", *map(str, runs), *flags]) == 0
    assert Page(file.read_text()).asked == []
    names = {p.name for p in (tmp_path / "figures").iterdir()}
    assert {"tradeoff0.svg", "tradeoff0.png", "run0neurons.svg", "recovery1.png"} <= names
    with browser_page() as (page, faults):
        page.goto(f"file://{file}")
        assert page.title() == "A & B"
        figures = page.locator("svg.figure")
        assert figures.count() >= 3
        for i in range(figures.count()):
            box = figures.nth(i).bounding_box()
            assert box is not None and box["width"] > 200 and box["height"] > 100
            assert figures.nth(i).get_attribute("aria-label")
        assert page.locator("svg.figure .tip > title").count() > 5
        page.get_by_role("button", name="parameters").click()
        first = page.locator("#summary tbody tr").first.locator("td").first.inner_text()
        assert first != "base", "the smallest comes first"
        view = figures.first.get_attribute("viewBox")
        figures.first.focus()
        page.keyboard.press("+")
        assert figures.first.get_attribute("viewBox") != view
        page.keyboard.press("0")
        assert [float(x) for x in figures.first.get_attribute("viewBox").split()] == pytest.approx(
            [float(x) for x in view.split()]
        )
        page.emulate_media(color_scheme="dark")
        colour = page.evaluate("getComputedStyle(document.querySelector('svg.figure text')).fill")
        assert colour == "rgb(232, 232, 232)"
        assert faults == []


def test_bad_input(runs, tmp_path, capsys):
    damaged = tmp_path / "damaged"
    shutil.copytree(runs[0], damaged)
    (damaged / "metrics.json").write_text("{}")
    for argv, message in (
        ([], "name at least one run"),
        (["/nowhere"], "there is no folder /nowhere"),
        ([str(tmp_path)], "holds no run"),
        ([str(damaged)], "is damaged"),
        ([str(runs[0]), "--output", "/proc/no/page.html"], "cannot write"),
    ):
        assert main(["report", *argv]) == 2
        assert message in capsys.readouterr().err


def test_models_may_lack_every_measurement():
    assert draw_tradeoffs([MeasuredModel("a", "pruned"), MeasuredModel("b", "pruned", parameters=5)]) == []
