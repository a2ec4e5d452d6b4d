"""The report, read as data and looked at in a browser."""

import io
import itertools
import json
import re
import shutil
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
from helpers.browser import browser_page
from matplotlib.text import Text

from llm_pruner.cli import main
from llm_pruner.evaluation.generation import QUALITY_PROMPTS
from llm_pruner.importance.scores import Scores
from llm_pruner.report.arguments import ReportArguments
from llm_pruner.report.drawing import Drawing
from llm_pruner.report.figures import draw_pruning, draw_recoveries
from llm_pruner.report.models import merge_models
from llm_pruner.report.page import write_report
from llm_pruner.report.runs import MeasuredModel, Run, read
from llm_pruner.report.sweeps import Sweep, draw_sweep, tabulate_sweep
from llm_pruner.report.tradeoffs import draw_tradeoffs
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
    assert [(m.model.rpartition("/")[2], m.stage) for m in pruned.models] == [
        ("base", "original"),
        ("pruned", "pruned"),
    ]
    assert pruned.models[1].parameters < pruned.models[0].parameters
    assert pruned.plan is not None and pruned.scores is not None and pruned.about["seed"] == 7
    for name, choice in pruned.plan.units.items():  # the scores are those that the cut was made by
        scores = pruned.scores.values[name]
        assert scores[choice.kept].min().item() == choice.lowest_kept
    (point,) = healed.models
    assert point.parameters == pruned.models[1].parameters and "loss" in healed.curves
    (text,) = point.perplexity
    assert text == "python-docs, 254 tokens in 128s"
    assert [p.model.rpartition("/")[2] for p in measured.models] == ["base", "pruned", "healed"]
    assert all(p.macs and len(p.speeds) == 2 and p.weight_bytes and p.perplexity for p in measured.models)
    assert all(len(said) == 3 for said in measured.samples.values()) and len(measured.samples) == len(QUALITY_PROMPTS)


def test_every_model_is_reported_once_with_its_method(runs):
    models = merge_models(map(read, runs))
    assert [(m.name, m.stage, m.method, m.size) for m in models] == [
        ("base", "original", "original", ""),
        ("pruned", "pruned", "param_second", "0.4"),
        ("healed", "recovered", "param_second + lora", "0.4"),
    ]
    assert models[2].seed == 7 and models[2].speeds and len(models[2].perplexity) == 2, "measurements of all its runs"
    assert merge_models(map(read, reversed(runs))) == models, "whatever the order of the folders"


def test_a_reduced_vocabulary_is_a_run(tmp_path):
    record = {
        "tokens_before": 500,
        "tokens_after": 300,
        "parameters_before": 900,
        "parameters_after": 700,
        "arguments": {"model": "smollm2-135m"},
    }
    (tmp_path / "fewer").mkdir()
    (tmp_path / "fewer" / "vocabulary.json").write_text(json.dumps(record))
    original, fewer = merge_models([read(tmp_path / "fewer")])
    assert (original.name, fewer.name, fewer.stage, fewer.parameters) == ("smollm2-135m", "fewer", "vocabulary", 700)


def test_runs_of_older_versions_are_read(runs, tmp_path):
    """Their metrics name the model as base_model."""
    metrics = json.loads((runs[0] / "metrics.json").read_text())
    metrics["arguments"]["base_model"] = metrics["arguments"].pop("model")
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    assert [model.name for model in merge_models([read(tmp_path)])] == ["base", tmp_path.name]


def test_perplexities_of_different_protocols_are_not_compared(runs):
    titles = [drawing.title for drawing in draw_tradeoffs(merge_models(map(read, runs)))]
    assert any("60 tokens in 16s" in title for title in titles)
    assert not any("254" in title for title in titles), "a single point is no trade-off"


def test_figures_show_and_describe_widths_scores_and_cuts(tmp_path):
    scores = torch.arange(1.0, 11.0).double()
    plan = PruningPlan(units={"layers.2.mlp.neurons": Choice("neurons", 2, 10, torch.arange(3, 10))})
    plan.units["layers.2.mlp.neurons"].explain(scores)
    run = Run("mine <b>", tmp_path, plan=plan, scores=Scores({"layers.2.mlp.neurons": scores}))
    widths, score_map, histogram = draw_pruning(run)
    assert "7 of 10 kept" in widths.alt and "7 kept and 3 removed" in histogram.alt
    assert "<title>layer 2: 7 of 10 neurons kept</title>" in widths.svg()
    svg = score_map.svg()
    assert "3 of 10 removed (30%), kept from 4, removed up to 3" in svg
    assert draw_pruning(run)[1].svg() == svg, "the same figure is the same text"
    ids = re.findall(r'id="([^"]*)"', svg)
    assert len(ids) == len(set(ids)) and all(name.startswith("mine-b-neurons-scores-") for name in ids)


class Texts:
    """The boxes of all texts that matplotlib draws in a figure, and its canvas."""

    def __init__(self, drawing: Drawing, monkeypatch):
        drawn: dict[int, tuple[str, Any]] = {}  # the figure is laid out by drawing it, so the last time counts
        draw = Text.draw

        def record(text, renderer):
            if text.get_visible() and text.get_text().strip():
                drawn[id(text)] = text.get_text(), Text.get_window_extent(text, renderer)
            draw(text, renderer)

        with monkeypatch.context() as patch:
            patch.setattr(Text, "draw", record)
            drawing.write(io.BytesIO(), "png", dpi=100)
        self.boxes = list(drawn.values())
        self.canvas = drawing.figure.bbox

    def outside(self) -> list[str]:
        slack = 0.5
        return [
            name
            for name, box in self.boxes
            if box.x0 < -slack or box.y0 < -slack or box.x1 > self.canvas.x1 + slack or box.y1 > self.canvas.y1 + slack
        ]

    def meeting(self) -> list[tuple[str, str]]:
        pairs = itertools.combinations(self.boxes, 2)
        return [
            (one, other)
            for (one, a), (other, b) in pairs
            if min(a.x1, b.x1) - max(a.x0, b.x0) > 0.5 and min(a.y1, b.y1) - max(a.y0, b.y0) > 0.5
        ]


def crowded_models() -> list[MeasuredModel]:
    """An original, and six methods at six sizes each, close together; one method also recovered, one over seeds."""
    original = {"perplexity": {"wikitext2, 32,768 tokens in 128s": 52.8}, "speeds": {"reading 1 x 128": 497.0}}
    models = [
        MeasuredModel(
            model="o", name="smollm2-135m", stage="original", method="original", parameters=134_515_008, **original
        )
    ]
    methods = ["param_first", "param_second", "l2", "random", "wanda, grouping_strategy mean", "preset best"]
    for i, method in enumerate([*methods, "param_first + lora"]):
        for j, ratio in enumerate((0.1, 0.15, 0.2, 0.25, 0.3, 0.4)):
            for seed in (0, 1) if method == "random" else (None,):
                quality = 53 * (1 + (0.3 + 0.4 * (i % 6)) * ratio * 4 ** (i % 6 * ratio)) + (seed or 0) * 9 * ratio
                models.append(
                    MeasuredModel(
                        model=f"{method}{ratio}{seed}",
                        name=f"{method} {ratio}" if i % 2 else f"run_{i}_{j}",
                        stage="pruned",
                        method=method,
                        size=str(ratio),
                        seed=seed,
                        parameters=int(134e6 * (1 - 0.6 * ratio)),
                        weight_bytes=int(538e6 * (1 - 0.6 * ratio)),
                        speeds={"reading 1 x 128": 497 + 300 * ratio + i},
                        perplexity={"wikitext2, 32,768 tokens in 128s": quality},
                        accuracy=0.6 - ratio / 4 - i / 100,
                        accuracy_error=0.011,
                    )
                )
    return models


def pruning_of(tmp_path, layers: int, size: int) -> Run:
    generator = torch.Generator().manual_seed(0)
    scores, plan = Scores({}, {"criterion": "taylor"}), PruningPlan()
    for layer in range(layers):
        name = f"model.layers.{layer}.mlp.neurons"
        scores.values[name] = torch.randn(size, generator=generator).double().mul(2).exp() * 1e-6 * (1 + layer)
        kept = scores.values[name].topk(size - size // 4 - layer % 5).indices.sort().values
        plan.units[name] = Choice("neurons", layer, size, kept)
        plan.units[name].explain(scores.values[name])
    return Run("a_run_with_a_rather_long_name", tmp_path, plan=plan, scores=scores)


def sweep_of(methods: int, ratios: list[float]) -> Sweep:
    rows = [
        {
            "point": 1,
            "prune.pruner_type": f"criterion_{i}",
            "prune.pruning_ratio": ratio,
            "seed": seed,
            "perplexity wikitext2": 50 * 30 ** (ratio * (1 + i / 5)) + seed,
            "piqa acc": 0.7 - ratio / 3 - seed / 100,
        }
        for i in range(methods)
        for ratio in ratios
        for seed in (0, 1)
    ]
    original = {"perplexity wikitext2": 52.8, "piqa acc": 0.71}
    return Sweep(name="study", rows=rows, original=original, varied=["prune.pruner_type", "prune.pruning_ratio"])


def crowded_drawings(tmp_path) -> list[Drawing]:
    losses = {
        f"eval_{name}_loss": [(i, 3 + k - i / 40) for i in range(40)] for k, name in enumerate(["c4", "ptb", "docs"])
    }
    curves = {"loss": [(i, 4 - i / 50) for i in range(40)], **losses}
    return [
        *draw_tradeoffs(crowded_models()),
        *draw_pruning(pruning_of(tmp_path, 80, 400)),
        *draw_sweep(sweep_of(9, [0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6])),
        *draw_recoveries([Run("healed", tmp_path, curves=curves)]),
    ]


def empty_drawings(tmp_path) -> list[Drawing]:
    few = [
        MeasuredModel(model="a", name="a", stage="original", method="original", parameters=5, accuracy=0.5),
        MeasuredModel(model="b", name="b", stage="pruned", method="l2", size="0.5", parameters=4, accuracy=0.5),
    ]
    return [
        *draw_tradeoffs(few),
        *draw_pruning(pruning_of(tmp_path, 1, 8)),
        *draw_sweep(sweep_of(1, [0.1, 0.2])),
        *draw_recoveries([Run("healed", tmp_path, curves={"loss": [(1, 3.0)]})]),
    ]


@pytest.mark.parametrize("draw", [crowded_drawings, empty_drawings])
def test_no_text_of_a_figure_is_clipped_or_meets_another(draw, tmp_path, monkeypatch):
    drawings = draw(tmp_path)
    assert len(drawings) >= 7
    for drawing in drawings:
        texts = Texts(drawing, monkeypatch)
        assert texts.boxes and texts.outside() == [] and texts.meeting() == [], drawing.name


def test_every_point_of_a_tradeoff_is_named(monkeypatch):
    drawing = draw_tradeoffs(crowded_models())[0]
    names = [name for name, _ in Texts(drawing, monkeypatch).boxes]
    assert "smollm2-135m, unpruned" in names and {f"run_{i}_{j}" for i in (0, 2, 4) for j in range(6)} <= set(names)
    assert names.count("0.25") == 3, "a point that a recipe named is labelled by its ratio, its seeds together"


def test_sweeps_are_tabulated_by_method_and_ratio():
    perplexities, accuracies = tabulate_sweep(sweep_of(2, [0.1, 0.2]))
    assert perplexities.title == "perplexity wikitext2 by pruning_ratio" and perplexities.heads == ["", "0.1", "0.2"]
    original, better, worse = perplexities.rows
    assert original == ("original", [("52.80", False)] * 2)
    assert better[0] == "criterion_0" and all(best and " ± 0.71" in text for text, best in better[1])
    assert not any(best for _, best in worse[1])
    assert accuracies.rows[1][1][0][0] == "66.17 ± 0.71"


@pytest.mark.parametrize("values", [[0.0, 0.0, 1.0], [0.0, 0.0, 0.0], [-torch.inf, 2.0, 3.0], [-1.0, 0.5, 2.0]])
def test_odd_scores_can_be_drawn(values, tmp_path):
    scores = torch.tensor(values, dtype=torch.float64)
    plan = PruningPlan(units={"mlp": Choice("neurons", 0, 3, torch.tensor([1, 2]))})
    plan.units["mlp"].explain(scores)
    drawings = draw_pruning(Run("odd", tmp_path, plan=plan, scores=Scores({"mlp": scores})))
    assert len(drawings) == 3 and all("<svg" in drawing.svg() for drawing in drawings)


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
    """Addresses that a page asks the network for."""

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
    assert {"figures.json", "pruned-neurons-widths.svg", "pruned-neurons-scores.pdf", "healed-recovery.png"} <= names
    assert len([name for name in names if "over-parameters" in name]) == 3
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
        page.get_by_role("button", name="params").click()
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


def test_figures_of_other_runs_are_not_replaced(runs, tmp_path, capsys):
    figures = tmp_path / "figures"
    flags = ["--figures", str(figures), "--output"]
    assert main(["report", str(runs[1]), *flags, str(tmp_path / "one.html")]) == 0
    before = {file: file.stat().st_mtime_ns for file in figures.iterdir()}
    capsys.readouterr()
    assert main(["report", str(runs[0]), *flags, str(tmp_path / "two.html")]) == 2
    assert f"{figures} holds figures of other runs" in capsys.readouterr().err
    assert {file: file.stat().st_mtime_ns for file in figures.iterdir()} == before
    assert not (tmp_path / "two.html").exists()
    assert main(["report", str(runs[1]), *flags, str(tmp_path / "one.html")]) == 0, "its own it may draw again"
    (figures / "figures.json").unlink()
    assert main(["report", str(runs[1]), *flags, str(tmp_path / "one.html")]) == 2
    assert "images that report did not write" in capsys.readouterr().err


def test_bad_input(runs, tmp_path, capsys):
    damaged, begun = tmp_path / "damaged", tmp_path / "begun"
    (begun / "evaluations").mkdir(parents=True)
    shutil.copytree(runs[0], damaged)
    (damaged / "metrics.json").write_text("{}")
    for argv, message in (
        ([], "name at least one run"),
        (["/nowhere"], "there is no folder /nowhere"),
        ([str(tmp_path)], "holds no run"),
        ([str(begun)], "holds no run"),
        ([str(damaged)], "is damaged"),
        ([str(runs[0]), "--output", "/proc/no/page.html"], "cannot write"),
    ):
        assert main(["report", *argv]) == 2
        assert message in capsys.readouterr().err


def test_models_may_lack_every_measurement():
    models = [MeasuredModel(model="a", stage="pruned"), MeasuredModel(model="b", stage="pruned", parameters=5)]
    assert draw_tradeoffs(models) == []


HOSTILE = '<img src=x onerror="window.pwned=1">$\\frac{$ & "q\' `'


def test_hostile_names_stay_text(runs, tmp_path, capsys):
    """Show names of a stranger's folders, models, prompts and texts, neither as HTML nor as mathematics."""
    renamed = []
    for number, run in enumerate(runs):
        folder = tmp_path / f"{number} {HOSTILE}"
        shutil.copytree(run, folder)
        for file in folder.glob("*.json"):
            text = file.read_text().replace("python-docs", json.dumps(HOSTILE)[1:-1])
            for name in ("base", "pruned", "healed"):
                text = re.sub(rf'"[^"]*/{name}"', lambda _, name=name: json.dumps(f"/nowhere/{name}{HOSTILE}"), text)
            file.write_text(text.replace(QUALITY_PROMPTS[0], json.dumps(HOSTILE)[1:-1]))
        renamed.append(str(folder))
    page = tmp_path / "page.html"
    flags = ["--output", str(page), "--title", HOSTILE, "--figures", str(tmp_path / "figures")]
    assert main(["report", *renamed, *flags]) == 0, capsys.readouterr().err
    with browser_page() as (tab, faults):
        tab.goto(page.as_uri())
        assert tab.title() == HOSTILE and HOSTILE in tab.locator("h1").inner_text()
        assert tab.evaluate("[document.images.length, window.pwned ?? 0]") == [0, 0] and faults == []
