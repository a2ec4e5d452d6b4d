"""Perplexity against a straight computation."""

import csv
import importlib
import io
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.models import build, tokens
from rich.console import Console
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

import llm_pruner as lp
from llm_pruner.cli import main
from llm_pruner.errors import PrunerError
from llm_pruner.evaluation.evaluate import Evaluation, Measurements, count_parts, evaluate_model, evaluate_models
from llm_pruner.evaluation.perplexity import Perplexity, byte_perplexity, perplexity, predicted_tokens, windows
from llm_pruner.evaluation.speed import Speed
from llm_pruner.evaluation.table import table
from llm_pruner.evaluation.tabular import TERMINAL, short_number, terminal_tables
from llm_pruner.files import strict_json


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_perplexity_is_the_exponential_of_the_mean_token_loss(batch_size):
    model, ids = build("llama"), tokens(7, 10)
    with torch.no_grad():
        losses = [cross_entropy(model(row[None]).logits[0, :-1].double(), row[1:], reduction="none") for row in ids]
    result = perplexity(model, ids, batch_size)
    assert result.perplexity == pytest.approx(math.exp(torch.cat(losses).mean()), rel=1e-6)
    assert (result.tokens, result.windows, result.seq_len) == (63, 7, 10)


def test_windows_lie_side_by_side():
    def tokenizer(text, **_: object):
        return {"input_ids": [ord(c) for c in text]}

    fake: PreTrainedTokenizerBase = tokenizer  # type: ignore[assignment]
    assert windows(fake, "abcdefgh", 3).tolist() == [[97, 98, 99], [100, 101, 102]]
    assert windows(fake, "abcdefgh", 3, 1).tolist() == [[97, 98, 99]]
    with pytest.raises(PrunerError, match="less than one window"):
        windows(fake, "ab", 3)
    with pytest.raises(PrunerError, match="at least 2"):
        windows(fake, "abc", 1)


def test_windows_that_overlap():
    """Every token but the first is predicted once, with at least the context that the stride leaves."""
    model, ids = build("llama"), tokens(1, 30)[0]

    def tokenizer(text, **_: object):
        return {"input_ids": ids.tolist()}

    cut = windows(tokenizer, "", 10, stride=4)  # type: ignore[arg-type]
    assert cut.tolist() == [ids[i : i + 10].tolist() for i in range(0, 21, 4)]
    losses = []
    with torch.no_grad():
        for i, row in enumerate(cut):
            each = cross_entropy(model(row[None]).logits[0, :-1].double(), row[1:], reduction="none")
            losses.append(each if i == 0 else each[-4:])
    expected = torch.cat(losses)
    for batch_size in (1, 4, None):
        result = perplexity(model, cut, batch_size, stride=4)
        assert result.perplexity == pytest.approx(math.exp(expected.mean()), rel=1e-6)
        assert result.tokens == len(expected) == 9 + 5 * 4
    with pytest.raises(PrunerError, match="stride 11"):
        windows(tokenizer, "", 10, stride=11)  # type: ignore[arg-type]


def test_batches_that_do_not_fit_are_made_smaller(monkeypatch):
    model, ids = build("llama"), tokens(40, 10)
    expected = perplexity(model, ids, 4).loss
    sizes = []
    forward = model.forward

    def tight(*args, **kwargs):
        sizes.append(len(kwargs["input_ids"]))
        if sizes[-1] > 8:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", tight)
    assert perplexity(model, ids, None).loss == pytest.approx(expected, rel=1e-6)
    assert sizes[0] == 32 and 4 <= sizes[-2] <= 8


def test_perplexity_per_byte_has_one_definition(home):
    """For adjacent and overlapping windows: the loss of all predicted tokens divided by their bytes."""
    model, tokenizer = lp.load(str(home / "base"))
    text = "for, while and if: the words of a language " * 20
    for seq_len, stride in ((16, None), (16, 15), (16, 4)):
        ids = windows(tokenizer, text, seq_len, stride=stride)
        result = perplexity(model, ids, stride=stride, tokenizer=tokenizer)
        predicted = predicted_tokens(ids, stride or seq_len)
        assert len(predicted) == result.tokens
        length = len(tokenizer.decode(predicted.tolist()).encode())
        assert result.byte_perplexity == pytest.approx(math.exp(result.loss * result.tokens / length), rel=1e-9)
        if stride == seq_len - 1:
            assert byte_perplexity(model, tokenizer, text, seq_len) == pytest.approx(result.byte_perplexity, rel=1e-6)
    assert perplexity(model, ids).byte_perplexity is None


def test_a_loss_that_is_not_finite_is_an_error_that_names_model_and_text(home, tmp_path, capsys):
    model, tokenizer = lp.load(str(home / "base"))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    lp.save(model, tokenizer, tmp_path / "broken")
    output = tmp_path / "out"
    argv = ["evaluate", str(tmp_path / "broken"), "--seq_len", "16", "--max_windows", "2", "--tokens", "0"]
    assert main([*argv, "--output", str(output)]) == 2
    message = capsys.readouterr().err
    assert f"the loss of {tmp_path / 'broken'} on general is not finite" in message
    assert "its weights hold NaN or infinity, first in model.layers.1.mlp.up_proj.weight (1 tensors in all)" in message
    assert not output.exists()


def test_a_loss_that_overflows_is_an_error(monkeypatch):
    model, ids = build("llama"), tokens(3, 8)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e7)
    with pytest.raises(PrunerError, match="nats per token, too large"):
        perplexity(model, ids)


def test_json_is_strict():
    record = {"a": [float("inf"), 1.5, {"b": float("nan")}], "c": (float("-inf"), "text")}
    assert json.loads(strict_json(record), parse_constant=pytest.fail) == {
        "a": [None, 1.5, {"b": None}],
        "c": [None, "text"],
    }


# --- Side by side ---------------------------------------------------------------------------------------------------


def test_parts(home):
    model, _ = lp.load(str(home / "base"))
    c = model.config
    kv = c.num_key_value_heads * c.head_dim
    assert count_parts(model) == {
        "embeddings": c.vocab_size * c.hidden_size,
        "self_attn": 3 * (2 * c.hidden_size * c.hidden_size + 2 * c.hidden_size * kv),
        "mlp": 3 * 3 * c.hidden_size * c.intermediate_size,
        "input_layernorm": 3 * c.hidden_size,
        "post_attention_layernorm": 3 * c.hidden_size,
        "other": c.hidden_size,
        "head": c.vocab_size * c.hidden_size,
    }


def test_a_table_of_models(home):
    settings = Measurements(texts={"docs": "some words of text " * 40}, seq_len=16, tokens=16, new_tokens=2)
    found = evaluate_models([str(home / "base"), str(home / "uniform")], lp.load, settings)
    shown = table(found)
    base, uniform = found
    assert base.parameters - uniform.parameters == 3 * 3 * 32 * 32 == base.parts["mlp"] - uniform.parts["mlp"]
    head, *rows = shown.cells()
    assert head[:5] == ["model", "params", "ratio", "MACs", "weights"] and [row[0] for row in rows] == [
        "base",
        "uniform",
    ]
    assert rows[1][1:3] == [short_number(uniform.parameters), f"{uniform.parameters / base.parameters:.3f}"]
    assert not [note for note in shown.notes if "tokenizers" in note]
    written = list(csv.DictReader(shown.csv().splitlines()))
    assert [row["parameters"] for row in written] == [str(base.parameters), str(uniform.parameters)]
    assert float(written[1]["perplexity_docs"]) == uniform.perplexity["docs"].perplexity
    assert int(written[1]["parameters_mlp"]) == uniform.parts["mlp"]
    assert shown.markdown().startswith("| model | params |") and "| uniform |" in shown.markdown()


def made_up(model: str, parameters: int, accuracy: float, decode: float = 20.0) -> Evaluation:
    quality = Perplexity(
        perplexity=20 + accuracy, loss=3.0, tokens=100, windows=1, seq_len=100, stride=100, byte_perplexity=2.0
    )
    return Evaluation(
        model=model,
        parameters=parameters,
        parts={},
        macs=17_779_654_656,
        weight_bytes=4 * parameters,
        cache_bytes=2**20,
        perplexity={"wikitext2": quality},
        tasks={"piqa": {"acc": accuracy, "acc_stderr": 0.011}, "arc_easy": {"acc_norm": accuracy}},
        speed=Speed(tokens=128, batch=1, new_tokens=32, prefill=497.0, decode=decode, peak_bytes=None),
        tokenizer="",
    )


def test_tables_go_into_papers_as_they_are():
    models = [
        made_up("smollm2-135m", 134_515_008, 0.7),
        made_up("prune_log/a_b", 117_262_656, 0.6),
        made_up("tune_log/a_b/merged", 117_262_656, 0.65, decode=25.0),
    ]
    shown = table(models)
    assert shown.models == ["smollm2-135m", "prune_log/a_b", "tune_log/a_b"]
    lines = shown.markdown().splitlines()
    assert lines[0] == (
        "| model | params | ratio | MACs | weights | ppl wikitext2 | ppl/byte wikitext2 | piqa acc % "
        "| arc_easy acc_norm % | read tok/s | write tok/s |"
    )
    # The original is no candidate for bold.
    assert lines[2].startswith("| smollm2-135m | 135 M | 1.000 | 17.8 G | 513 MiB |")
    assert lines[2].endswith("| 20.70 | 2.00 | 70.0 ± 1.1 | 70.0 | 497.0 | 20.00 |"), (
        "the original is no candidate for bold"
    )
    assert lines[3].endswith("| **20.60** | 2.00 | 60.0 ± 1.1 | 60.0 | 497.0 | 20.00 |")
    assert lines[4].endswith("| 20.65 | 2.00 | **65.0 ± 1.1** | **65.0** | 497.0 | **25.00** |")
    latex = shown.latex().splitlines()
    assert latex[0] == "\\begin{tabular}{lrrrrrrrrrr}" and latex[1:4:2] == ["\\toprule", "\\midrule"]
    assert latex[6].startswith("tune\\_log/a\\_b & ") and "\\textbf{65.0 $\\pm$ 1.1}" in latex[6]
    (first, *_) = csv.DictReader(shown.csv().splitlines())
    assert first["macs"] == "17779654656" and first["piqa_acc"] == "0.7" and first["piqa_acc_stderr"] == "0.011"


def test_perplexities_per_token_of_different_tokenizers_do_not_compete():
    models = [made_up("base", 1000, 0.7), made_up("smaller", 800, 0.6), made_up("fewer-tokens", 800, 0.5)]
    assert "**20.50**" in table(models).markdown()
    models[2] = replace(models[2], tokenizer="another")
    assert "**20.50**" not in table(models).markdown() and "**60.0" in table(models).markdown()


@pytest.mark.parametrize("width", [60, 80, 100])
def test_tables_fit_a_terminal_without_breaking_words(width):
    shown = table([made_up(f"runs/{'a_long_name_of_a_run_' * 2}{i}", 10**9 - i, 0.5 + i / 100) for i in range(4)])
    console = Console(width=width, record=True, file=io.StringIO())
    for part in terminal_tables(shown.cells(TERMINAL), width):
        console.print(part)
    text = console.export_text()
    words = {word for row in shown.cells() for cell in row for word in cell.split() if "long_name" not in word}
    assert all(word in text for word in words) and "…" not in text.replace("a_long_name_of_…", "")
    assert max(map(len, text.splitlines())) <= width


def test_numbers_of_the_readme_are_compared_by_row_and_head(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[1] / "benchmarks")
    readme = importlib.import_module("readme")
    written = table([made_up("base", 1000, 0.7), made_up("smaller", 800, 0.6, decode=30.0)]).markdown()
    (measured,) = readme.tables(written)
    (same,) = readme.tables(
        "| | ppl wikitext2 | write tok/s |\n|---|---|---|\n| base | 20.7 | 40 |\n| smaller | 20.5 | 63 |\n"
    )
    assert readme.is_of(same, measured) and readme.differences(same, measured) == []
    (other,) = readme.tables(
        "| | params | ppl wikitext2 |\n|---|---|---|\n| base | 1.01 k | 20.7 |\n| smaller | 800 | 30 |\n"
    )
    assert [line.partition(":")[0] for line in readme.differences(other, measured)] == [
        "base, params",
        "smaller, ppl wikitext2",
    ]
    (foreign,) = readme.tables("| | speedup |\n|---|---|\n| base | 1 |\n")
    assert not readme.is_of(foreign, measured)


def test_other_tokenizers_are_told(home, smollm2):
    settings = Measurements(texts={"docs": "some words of text " * 40}, seq_len=8, tokens=0)
    models = {"a": lp.load(str(home / "base")), "b": smollm2}
    shown = table(evaluate_models(models, lambda name: models[name], settings))
    assert shown.notes[0].endswith("compare their perplexities per byte, not per token.")


def test_the_command_writes_everything(home, tasks, tmp_path, capsys):
    models = [str(home / "base"), str(home / "pruned")]
    flags = [
        "--seq_len",
        "16",
        "--max_windows",
        "8",
        "--tasks",
        "ours",
        "--include_path",
        str(tasks),
        "--device",
        "cpu",
    ]
    flags += ["--tokens", "16", "--new_tokens", "2", "--output", str(tmp_path / "out")]
    assert main(["evaluate", *models, *flags]) == 0
    said = capsys.readouterr().out
    assert "ppl general" in said and "ours" in said
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())["models"]
    assert [one["model"] for one in found] == models and found[0]["tasks"]["ours"]["acc"] >= 0
    names = sorted(p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.*"))
    assert names == [
        "evaluation.json",
        "lm_eval/0_base.json",
        "lm_eval/1_pruned.json",
        "table.csv",
        "table.md",
        "table.tex",
    ]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "name at least one model"),
        (["/nowhere"], "there is no model folder /nowhere"),
        (["smollm2-135m", "--stride", "-1"], "--stride -1"),
        (["smollm2-135m", "--datasets", "wikitext3"], "no data set 'wikitext3'"),
        (["smollm2-135m", "--limits", "3"], "did you mean --limit?"),
    ],
)
def test_bad_input_of_the_command(argv, message, capsys):
    assert main(["evaluate", *argv]) == 2
    assert message in capsys.readouterr().err


def test_settings_cannot_be_changed():
    with pytest.raises(AttributeError):
        Measurements().tokens = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        Measurements({})  # type: ignore[misc]


def test_evaluate_is_a_function_too(home):
    model, tokenizer = lp.load(str(home / "base"))
    found = evaluate_model("base", model, tokenizer, Measurements(tokens=0))
    assert found.speed is None and found.non_embedding == found.parameters - found.parts["embeddings"]


def test_a_text_of_one_overlapping_window_is_measured():
    model, ids = build("llama"), tokens(1, 16)
    assert perplexity(model, ids, stride=8).loss == pytest.approx(perplexity(model, ids).loss)


def test_tables_of_other_programs_stay(home, home_text, tmp_path, capsys):
    (tmp_path / "table.csv").write_text("mine")
    command = f"evaluate {home}/base --datasets {home_text} --seq_len 16 --max_windows 2 --tokens 0 --output {tmp_path}"
    assert main(command.split()) == 2
    assert "table.csv is not from evaluate, which would replace it" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["table.csv"]
    (tmp_path / "table.csv").unlink()
    assert [main(command.split()), main(command.split())] == [0, 0], "its own tables are replaced"
