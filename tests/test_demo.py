"""The demo: its commands are those that a user would type, and its table shows all three models."""

import io
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.models import build, tokens
from rich.console import Console

import llm_pruner as lp
from llm_pruner.cli import main
from llm_pruner.commands import COMMANDS
from llm_pruner.evaluation.evaluate import Evaluation
from llm_pruner.evaluation.perplexity import perplexity
from llm_pruner.evaluation.speed import Speed
from llm_pruner.flags import parse_flags
from llm_pruner.recipes.demo import PROMPTS, comparison, demo_steps
from llm_pruner.tools.arguments import DemoArguments


@pytest.mark.parametrize("flags", [{}, {"pruning_ratio": 0.3, "kinds": ["heads", "neurons"]}])
def test_the_commands_of_the_demo_can_be_typed(flags):
    for step in demo_steps(DemoArguments(**flags), Path("out put")):
        program, name, *argv = shlex.split(step.line())
        arguments = parse_flags(COMMANDS[name].arguments_class, argv, name, "")
        assert program == "llm-pruner" and arguments == COMMANDS[name].arguments_class.of(**step.flags)
        COMMANDS[name].check_arguments(arguments)


def test_the_table_of_the_demo_shows_size_speed_quality_and_text():
    quality = perplexity(build("llama"), tokens())
    original = Evaluation(
        model="original",
        parameters=1000,
        parts={},
        macs=1,
        weight_bytes=2**21,
        cache_bytes=0,
        perplexity={"general": replace(quality, perplexity=50.0)},
        tasks={},
        speed=Speed(tokens=8, batch=1, new_tokens=4, prefill=9.0, decode=10.0, peak_bytes=None),
        tokenizer="",
        samples=dict.fromkeys(PROMPTS, " Paris.\n"),
    )
    worse = {"general": replace(quality, perplexity=55.0)}
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(
        comparison([original, replace(original, parameters=900, perplexity=worse), replace(original, speed=None)])
    )
    said = console.export_text()
    assert all(text in said for text in ("900 (0.90x)", "55.00 (1.10x)", "10.0 (1.00x)", "nan", "Paris.", *PROMPTS))


def test_a_second_demo_takes_the_place_of_the_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("llm_pruner.recipes.demo.DemoStep.run", lambda step: None)
    monkeypatch.setattr("llm_pruner.recipes.demo.measure_models", lambda arguments: [])
    monkeypatch.setattr("llm_pruner.recipes.demo.write_evaluations", lambda *_: None)
    monkeypatch.setattr("llm_pruner.recipes.demo.table", lambda _: None)
    monkeypatch.setattr("llm_pruner.recipes.demo.comparison", lambda _: "")
    lp.save(build("llama"), None, tmp_path / "demo" / "pruned")
    (tmp_path / "demo" / "evaluation").mkdir()
    assert main(["demo", "--output_root", str(tmp_path)]) == 0
    for place in ("", "pruned"):
        (tmp_path / "demo" / place / "thesis").mkdir()
        assert main(["demo", "--output_root", str(tmp_path)]) == 2
        assert "thesis" in capsys.readouterr().err
        (tmp_path / "demo" / place / "thesis").rmdir()


@pytest.mark.slow
def test_the_demo(tmp_path, capsys):
    """The pruned model is smaller, the recovered one better than the pruned."""
    assert main(["demo", "--output_root", str(tmp_path), "--steps", "4"]) == 0
    said = capsys.readouterr().out
    assert "France" in said and (tmp_path / "demo" / "report.html").is_file()
    model, _ = lp.load(str(tmp_path / "demo" / "recovered" / "merged"))
    assert sum(p.numel() for p in model.parameters()) <= 0.9 * 134_515_008
    line = next(line for line in said.splitlines() if " perplexity " in line)
    _, pruned, recovered = (float(cell.split()[0]) for cell in line.split("\u2502")[2:5])
    assert recovered < pruned
