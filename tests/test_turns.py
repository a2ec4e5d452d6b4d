"""Compared models are timed in turns: a load on the machine meets all of them, and noise is named as noise."""

import csv
import gc
import io
import json
import logging
import statistics
import weakref
from dataclasses import replace

import pytest
from helpers.models import build
from peft import LoraConfig, get_peft_model
from rich.console import Console
from test_evaluation import made_up

import llm_pruner as lp
from llm_pruner import turns
from llm_pruner.cli import main
from llm_pruner.evaluation import evaluate, latency, speed, together
from llm_pruner.evaluation.evaluate import Measurements, evaluate_models
from llm_pruner.evaluation.speed import Speed, speeds, warnings_of
from llm_pruner.evaluation.table import table
from llm_pruner.recipes.demo import GENERAL, PROMPTS, comparison
from llm_pruner.turns import ROUNDS, Ratio, paired_ratio, relative_spread

LOADS = [1.0, 1.0, 4.0, 4.0, 1.5, 9.0, 1.0]  # how much slower the machine is in each round
SETTINGS = Measurements(texts={"docs": "some words of text " * 40}, seq_len=16, tokens=16, new_tokens=2)


def inject(monkeypatch, microseconds):
    """Replace the clocks of forward passes: ``microseconds(model, n)`` of the n-th measurement, 0 is the warm-up.

    Returns:
        The ids of the models in the order in which they were measured.
    """
    order = []

    def pass_clock(model, tokens, batch):
        def measure():
            order.append(id(model))
            return microseconds(model, order.count(id(model)) - 1)

        return measure

    monkeypatch.setattr(speed, "pass_clock", pass_clock)
    monkeypatch.setattr(latency, "pass_clock", pass_clock)
    return order


def loaded(times):
    """Return a clock whose passes take a model's time, times the load of the round; the warm-up takes for ever."""
    return lambda model, n: times[model] * LOADS[n - 1] if n else 1e9


def test_models_take_turns_after_a_warm_up_and_ratios_are_paired(monkeypatch):
    first, second = build("llama"), build("llama")
    order = inject(monkeypatch, loaded({first: 200.0, second: 100.0}))
    slow, fast = speeds([first, second], 16, 2, new_tokens=2)
    assert ROUNDS >= 5 and order == [id(first), id(second)] * (1 + ROUNDS), "a warm-up of each, then round after round"
    assert fast.prefill == pytest.approx(2 * 16 / (100e-6 * statistics.median(LOADS)))
    assert fast.prefill_spread == pytest.approx(slow.prefill_spread) and fast.prefill_spread > 0.5
    assert fast.prefill_ratio.median == pytest.approx(2) and fast.prefill_ratio.spread == pytest.approx(0, abs=1e-9)
    assert fast.prefill_ratio.is_clear, "the load was the same for both"
    assert slow.prefill_ratio is slow.decode_ratio is None and slow.rounds == ROUNDS
    assert fast.decode_ratio.median > 0 and fast.decode_spread >= 0


def test_latencies_are_measured_in_turns(monkeypatch):
    first, second = build("llama"), build("llama")
    order = inject(monkeypatch, loaded({first: 10.0, second: 5.0}))
    rounds = latency.latencies((first, second), 16)
    assert order == [id(first), id(second)] * (1 + ROUNDS)
    assert rounds == [[time * load for load in LOADS] for time in (10.0, 5.0)]


@pytest.mark.parametrize(
    ("ratios", "clear"),
    [
        ([1.25, 1.26, 1.24, 1.25, 1.9], True),  # one outlier
        ([0.32, 0.34, 0.33, 0.36, 0.34], True),
        ([1.3, 0.8, 1.1, 0.9, 1.2], False),  # the range includes 1
        ([1.1, 1.5, 1.2, 1.7, 1.01], False),  # it does not, and is wider than the distance from 1
        ([1.0] * 5, False),
    ],
)
def test_a_ratio_within_its_spread_says_nothing(ratios, clear):
    ratio = paired_ratio(ratios, [1.0] * 5)
    assert ratio.median == statistics.median(ratios) and ratio.is_clear == clear
    assert ratio.spread * ratio.median == pytest.approx(sorted(ratios)[3] - sorted(ratios)[1])
    assert clear == (ratio.warning == "")
    if ratio.is_clear:
        assert not sorted(ratios)[1] <= 1 <= sorted(ratios)[3]


def test_the_warning_gives_spread_and_advice():
    unclear = Speed(
        tokens=8,
        batch=1,
        new_tokens=4,
        prefill=9.0,
        decode=1.0,
        peak_bytes=None,
        prefill_ratio=Ratio(median=1.2, spread=0.4),
        decode_ratio=Ratio(median=1.2, spread=0.1),
    )
    assert warnings_of(["a", "b", "c"], [None, unclear, None]) == [
        "b, read tok/s: speeds vary by 40.0% between repetitions: close other programs, or repeat; "
        "the ratio 1.20 says nothing"
    ]


def timed(model, decode, ratio=None, spread=0.03):
    """An evaluation whose decode speed has a spread and, but for the first model's, a ratio."""
    one = made_up(model, 1000, 0.7, decode=decode)
    measured = replace(one.speed, rounds=7, prefill_spread=0.01, decode_spread=spread, decode_ratio=ratio)
    if ratio is not None:
        measured = replace(measured, prefill_ratio=Ratio(median=2.0, spread=0.01))
    return replace(one, speed=measured)


def test_tables_show_spreads_and_ratios():
    shown = table([timed("base", 177.0), timed("smaller", 230.1, Ratio(median=1.31, spread=0.02), 0.05)])
    head, base, smaller = shown.cells(("<", ">"))
    assert head[-4:] == ["read tok/s", "read ratio", "write tok/s", "write ratio"]
    assert base[-2:] == ["177.0 ±3.0%", ""] and smaller[-2:] == ["<230.1 ±5.0%>", "1.31 ±2.0%"]
    assert "±3.0\\%" in shown.latex().replace("$\\pm$", "±")
    row = list(csv.DictReader(shown.csv().splitlines()))[1]
    assert (row["decode_tokens_per_second_spread"], row["decode_ratio"]) == ("0.05", "1.31")
    assert any("median of 7 rounds" in note and "Ratios to the first model" in note for note in shown.notes)
    assert not [note for note in shown.notes if "says nothing" in note or "one after the other" in note]


def test_tables_name_ratios_that_say_nothing():
    shown = table([timed("base", 177.0), timed("runs/smaller", 230.1, Ratio(median=1.31, spread=0.4))])
    assert shown.cells(("<", ">"))[2][-2] == "230.1 ±3.0%", "no speed is the best"
    assert [note for note in shown.notes if note.startswith("smaller, write tok/s: speeds vary by 40.0%")]
    apart = table([timed("base", 177.0), timed("smaller", 230.1)])
    assert "write ratio" not in apart.cells()[0]
    assert any("timed one after the other" in note for note in apart.notes)
    assert not any("one after the other" in note for note in table([timed("base", 177.0)]).notes)


def test_the_demo_shows_the_paired_ratio():
    models = [timed("base", 10.0), timed("pruned", 30.0, Ratio(median=1.5, spread=0.0)), timed("recovered", 20.0)]
    quality = models[0].perplexity["wikitext2"]
    console = Console(width=160, record=True, file=io.StringIO())
    samples = dict.fromkeys(PROMPTS, "")
    console.print(comparison([replace(one, perplexity={GENERAL: quality}, samples=samples) for one in models]))
    text = console.export_text()
    assert "30.0 (1.50x)" in text
    assert "20.0 (2.00x)" in text, "without turns, the ratio of the speeds"


@pytest.mark.parametrize("kept", [True, False])
def test_models_are_kept_for_their_turns_and_freed_otherwise(home, monkeypatch, kept):
    references, alive = [], []

    def load(name):
        gc.collect()
        alive.append([reference() is not None for reference in references])
        model, tokenizer = lp.load(name)
        references.append(weakref.ref(model))
        return model, tokenizer

    inject(monkeypatch, lambda model, n: 100.0)
    found = evaluate_models([str(home / name) for name in ("base", "uniform")], load, SETTINGS, together=kept)
    assert alive == [[], [kept]]
    assert [one.speed.prefill_ratio is not None for one in found] == [False, kept]
    gc.collect()
    assert not any(reference() is not None for reference in references)


def test_an_unclear_ratio_is_logged(home, monkeypatch, caplog):
    inject(monkeypatch, lambda model, n: 100.0)
    with caplog.at_level(logging.WARNING, "llm_pruner"):
        evaluate_models([str(home / name) for name in ("base", "uniform")], lp.load, SETTINGS, together=True)
    assert f"{home / 'uniform'}, read tok/s: speeds vary by 0% between repetitions" in caplog.text


def test_models_are_kept_where_all_weights_take_half_of_the_free_memory(home, monkeypatch, caplog):
    names = [str(home / name) for name in ("base", "pruned", "uniform")]
    needed = sum(p.nbytes for name in names for p in lp.load(name)[0].parameters())
    with caplog.at_level(logging.INFO, "llm_pruner"):
        monkeypatch.setattr(together, "free_bytes", lambda device: 2 * needed)
        assert together.fit_together(names) and not caplog.text
        assert not together.fit_together([*names, names[0]])
        assert "models are timed one after the other: together they need" in caplog.text
        monkeypatch.setattr(together, "free_bytes", lambda device: 2 * needed - 1)
        assert not together.fit_together(names) and together.fit_together(names, dtype="bfloat16")
        caplog.clear()
        assert not together.fit_together([*names, "/nowhere"])
        assert "the size of /nowhere is known only once it is loaded" in caplog.text


def test_the_size_of_a_model_is_known_before_it_is_loaded(home, tmp_path):
    model, _ = lp.load(str(home / "base"))
    size = sum(p.nbytes for p in model.parameters())
    model.name_or_path = str(home / "base")
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    assert together.weight_bytes(str(home / "base"), "auto") == size
    assert together.weight_bytes(str(home / "base"), "float16") == size / 2
    assert together.weight_bytes(str(tmp_path), "auto") == size, "an adapter is merged into its base"
    assert together.weight_bytes("smollm2-135m", "auto") == 538060032, "dequantized to float32"


@pytest.mark.parametrize("room", [2**40, 0])
def test_the_command_records_turns(home, tmp_path, monkeypatch, capsys, room):
    monkeypatch.setattr(together, "free_bytes", lambda device: room)
    names = [str(home / "base"), str(home / "pruned")]
    flags = "--max_windows 2 --seq_len 16 --device cpu --tokens 16 --new_tokens 2"
    assert main(["evaluate", *names, *flags.split(), "--output", str(tmp_path / "out")]) == 0
    first, second = (one["speed"] for one in json.loads((tmp_path / "out/evaluation.json").read_text())["models"])
    assert first["rounds"] == second["rounds"] == ROUNDS and first["prefill_ratio"] is None
    assert all(one[f"{what}_spread"] >= 0 for one in (first, second) for what in ("prefill", "decode"))
    output = capsys.readouterr()
    if room:
        assert second["prefill_ratio"]["median"] > 0 and second["decode_ratio"]["spread"] >= 0
    else:
        assert second["prefill_ratio"] is None and "one after the other" in output.out
        assert "models are timed one after the other: together they need" in output.err


def test_speed_that_is_not_asked_for_is_not_measured(home, monkeypatch):
    monkeypatch.setattr(evaluate, "speeds", None)
    monkeypatch.setattr(evaluate, "speed", None)
    (found,) = evaluate_models([str(home / "base")], lp.load, replace(SETTINGS, tokens=0), together=True)
    assert found.speed is None


def test_a_pruning_run_to_a_latency_records_the_paired_ratio(home, tmp_path, monkeypatch):
    models = []

    def microseconds(model, n):
        models.extend([model] if model not in models else [])
        return (200.0, 150.0)[models.index(model)] * LOADS[n - 1] if n else 1e9

    def count(model, tokens, batch):  # instead of times of layers, which a tiny model does not shorten
        layers = {("model.layers", i): sum(p.numel() for p in m.parameters()) for i, m in enumerate(model.model.layers)}
        return float(sum(p.numel() for p in model.parameters())), {k: float(v) for k, v in layers.items()}

    monkeypatch.setattr(latency, "time_layers", count)
    order = inject(monkeypatch, microseconds)
    command = f"prune --model {home / 'base'} --output {tmp_path / 'run'} --target_latency 0.95 --budget_tokens 16"
    options = "--kinds neurons --calib_dataset general --num_examples 4 --calib_seq_len 16 --compensate none"
    assert main([*command.split(), *options.split(), "--device", "cpu", "--eval_datasets="]) == 0
    assert len(order) == 2 * (1 + ROUNDS)
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())["latency"]
    assert (found["before_us"], found["after_us"]) == (300.0, 225.0)
    assert found["ratio"] == {"median": pytest.approx(0.75), "spread": pytest.approx(0, abs=1e-9)}
    assert found["before_spread"] == pytest.approx(relative_spread(LOADS)) and found["tokens"] == 16


def test_rounds_follow_each_other():
    order = []
    results = turns.in_turns([lambda: order.append("a") or len(order), lambda: order.append("b") or len(order)], 3)
    assert "".join(order) == "ababab" and results == [[1, 3, 5], [2, 4, 6]]
