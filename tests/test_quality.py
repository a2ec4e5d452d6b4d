"""Comparisons of models: paired statistics, divergence, generation, and how tables and reports show them."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.architectures import perturbed
from helpers.models import build, tokens
from test_evaluation import made_up
from test_report import Texts
from transformers import AutoConfig, AutoModelForSeq2SeqLM

import llm_pruner as lp
from llm_pruner.cli import main
from llm_pruner.evaluation.divergence import Divergence, OriginalDistributions
from llm_pruner.evaluation.generation import QUALITY_PROMPTS, GenerationQuality, continue_prompts, repetition
from llm_pruner.evaluation.paired import MEAN, compare_questions
from llm_pruner.evaluation.perplexity import perplexity
from llm_pruner.evaluation.questions import Questions
from llm_pruner.evaluation.table import as_json, table
from llm_pruner.models.generate import continue_text
from llm_pruner.recipes.results import STDERR, stage_cells, summarize
from llm_pruner.recipes.steps import _row_of
from llm_pruner.report.comparison import compare_models
from llm_pruner.report.models import merge_models
from llm_pruner.report.runs import MeasuredModel, read


def answered(scores, *, chance=0.25, metric="acc", examples=0, answers=None) -> Questions:
    return Questions(
        metric=metric,
        total=len(scores),
        examples=examples,
        ids=tuple(f"{i:08x}" for i in range(len(scores))),
        scores=tuple(float(score) for score in scores),
        chance=(chance,) * len(scores),
        answers=tuple(map(str, scores if answers is None else answers)),
    )


def drawn(share: float, count: int = 400, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).random(count) < share).astype(float)


# --- Paired statistics ------------------------------------------------------------------------------------------------


def test_intervals_are_those_of_a_bootstrap_over_questions():
    first = drawn(0.7)
    other = np.where(drawn(0.8, seed=1) > 0, first, drawn(0.3, seed=2))  # mostly the same answers
    compared = compare_questions({"t": answered(first)}, {"t": answered(other)})["t"]
    generator = np.random.default_rng(3)
    places = generator.integers(0, 400, (10_000, 400))
    differences = (other - first)[places].mean(axis=1)
    shares = (other[places].mean(axis=1) - 0.25) / (first[places].mean(axis=1) - 0.25)
    assert compared.difference.value == pytest.approx(other.mean() - first.mean())
    assert compared.retention is not None
    assert compared.retention.value == pytest.approx((other.mean() - 0.25) / (first.mean() - 0.25))
    for interval, draws in ((compared.difference, differences), (compared.retention, shares)):
        bounds = np.quantile(draws, [0.025, 0.975])
        assert [interval.low, interval.high] == pytest.approx(bounds, abs=0.1 * (bounds[1] - bounds[0]))
    unpaired = 1.96 * np.sqrt(first.var() / 400 + other.var() / 400)
    assert compared.difference.high - compared.difference.value < unpaired, "pairs tell more than two standard errors"


def test_comparisons_are_reproducible_and_depend_on_no_other_task():
    first, other = {"a": answered(drawn(0.6))}, {"a": answered(drawn(0.5, seed=1))}
    alone = compare_questions(first, other)
    assert compare_questions(first, other) == alone and MEAN not in alone
    both = compare_questions(first | {"b": answered(drawn(0.9))}, other | {"b": answered(drawn(0.8, seed=1))})
    assert list(both) == [MEAN, "a", "b"] and both["a"] == alone["a"]
    assert compare_questions(first, other, seed=1)["a"].difference != alone["a"].difference
    assert both[MEAN].accuracy == pytest.approx((both["a"].accuracy + both["b"].accuracy) / 2)
    assert both[MEAN].questions == 800


def test_equal_answers_are_no_difference_and_few_questions_prove_little():
    same = answered(drawn(0.6))
    (compared,) = compare_questions({"a": same}, {"a": same}).values()
    assert not compared.is_real and compared.agreement == 1.0 and compared.retention.value == 1.0  # type: ignore[union-attr]
    worse = [1] * 6 + [0] * 4
    better = [1] * 7 + [0] * 3
    (few,) = compare_questions({"a": answered(better)}, {"a": answered(worse)}).values()
    (many,) = compare_questions({"a": answered(better * 40)}, {"a": answered(worse * 40)}).values()
    assert few.difference.value == pytest.approx(many.difference.value)
    assert not few.is_real and many.is_real


def test_an_original_at_chance_has_nothing_to_keep():
    (compared,) = compare_questions({"a": answered(drawn(0.25))}, {"a": answered(drawn(0.2, seed=1))}).values()
    assert compared.retention is None


def test_only_equal_questions_are_paired():
    first = answered(drawn(0.6, 20))
    for other in (replace(first, metric="acc_norm"), replace(first, examples=5), replace(first, ids=("x",) * 20)):
        assert compare_questions({"a": first}, {"a": other}) == {}
    half = replace(first, ids=(*first.ids[:10], *("x",) * 10))
    assert compare_questions({"a": first}, {"a": half})["a"].questions == 10


def test_questions_are_paired_wherever_they_stand():
    """Limits shorten every task of a group, so places differ; a task may repeat a question."""
    ids = ("a", "b", "b", "c", "d", "e")
    first = replace(answered([1, 0, 1, 1, 0, 1]), ids=ids)
    few = replace(answered([0, 1, 1]), ids=("b", "b", "e"))
    compared = compare_questions({"t": first}, {"t": few})["t"]
    assert compared.questions == 3 and compared.agreement == 1.0


# --- Divergence and generation ----------------------------------------------------------------------------------------


def test_divergence_is_the_mean_over_tokens_of_the_whole_vocabulary():
    first, other, ids = build("llama"), build("llama", seed=1), tokens(5, 12)
    distributions = OriginalDistributions()
    assert distributions.compare(first, {"text": ids}, "t") == {}
    assert distributions.compare(first, {"text": ids}, "t")["text"].kl < 1e-6
    measured = distributions.compare(other, {"text": ids}, "t")["text"]
    with torch.no_grad():
        p, q = (model(ids).logits[:, :-1].double().log_softmax(-1) for model in (first, other))
    each = (p.exp() * (p - q)).sum(-1)
    assert measured.kl == pytest.approx(each.mean().item(), rel=2e-3)
    assert measured.error == pytest.approx((each.mean(dim=1).std() / 5**0.5).item(), rel=0.02)
    assert measured.tokens == 5 * 11
    assert distributions.compare(other, {"text": ids}, "other tokenizer") == {}
    for others in (ids[:3], ids.flip(1)):  # another BOS or normalizer beside the same vocabulary
        assert distributions.compare(other, {"text": others}, "t") == {}


def test_repetition_and_length_of_continuations(home):
    model, tokenizer = lp.load(str(home / "base"))
    texts, quality = continue_prompts(model, tokenizer, QUALITY_PROMPTS[:3], 24)
    assert texts == {prompt: continue_text(model, tokenizer, prompt, 24) for prompt in QUALITY_PROMPTS[:3]}
    assert (quality.prompts, quality.new_tokens) == (3, 24) and 0 < quality.tokens <= 24
    with torch.no_grad():  # every token is followed by the end
        model.lm_head.weight.zero_()
        model.model.norm.weight.zero_()
    model.generation_config.eos_token_id = model.lm_head.weight.argmax().item()
    _, quality = continue_prompts(model, tokenizer, QUALITY_PROMPTS[:2], 24)
    assert (quality.tokens, quality.ended, quality.repetition) == (0.0, 1.0, 0.0)
    assert repetition([7] * 24) == 1 - 1 / 21


def test_a_decoder_that_begins_with_the_end_has_not_ended(tokenizer):
    """BART's decoder begins with the end-of-text token, which is no token that it writes."""
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "d_model": 32, "max_position_embeddings": 64}
    config = AutoConfig.for_model("bart", vocab_size=len(tokenizer), forced_eos_token_id=None, **sizes)
    model = perturbed(AutoModelForSeq2SeqLM, config)
    model.final_logits_bias[0, config.eos_token_id] = -1e4
    _, quality = continue_prompts(model, tokenizer, QUALITY_PROMPTS[:2], 16)
    assert quality.tokens == 16 and quality.ended == 0
    with pytest.raises(lp.PrunerError, match="give --seq_len 3 or more"):
        perplexity(model, tokens(2, 2))


# --- Tables, results of recipes, reports ------------------------------------------------------------------------------


def compared_models():
    first = made_up("smollm2-135m", 134_515_008, 0.7)
    questions = {name: answered(drawn(0.7, seed=i)) for i, name in enumerate(("piqa", "arc_easy"))}
    quality = GenerationQuality(repetition=0.25, tokens=30.0, ended=0.5, prompts=8, new_tokens=32)
    first = replace(first, questions=questions, generation=quality)
    models = [first]
    for name, share, kl in (("pruned", 0.5, 0.9), ("recovered", 0.64, 0.3)):
        worse = {task: answered(drawn(share, seed=i + 5)) for i, task in enumerate(questions)}
        divergence = {"wikitext2": Divergence(kl=kl, error=0.01, tokens=2032)}
        models.append(replace(made_up(name, 1000, share), questions=worse, divergence=divergence, generation=quality))
    return models


def test_the_table_answers_whether_differences_are_real():
    shown = table(compared_models())
    head, first, pruned, _ = shown.cells()
    cells = dict(zip(head, pruned, strict=True))
    assert re.fullmatch(r"\d+\.\d \[\d+\.\d, \d+\.\d\]", cells["kept %"])
    assert re.fullmatch(r"-\d+\.\d \[-\d+\.\d, -\d+\.\d\]", cells["difference, points"]) and cells["real"] == "yes"
    assert cells["KL wikitext2"] == "0.900 ± 0.010" and cells["repeats %"] == "25.0" and cells["length"] == "30.00"
    assert " ± " in cells["mean acc %"] and dict(zip(head, first, strict=True))["kept %"] == ""
    for model, other in (("pruned", "smollm2-135m"), ("recovered", "smollm2-135m"), ("recovered", "pruned")):
        (note,) = [note for note in shown.notes if note.startswith(f"{model} against {other}: mean of 2 tasks")]
        assert len(re.findall(r"(real|may be chance)", note)) == 3 and "piqa " in note
    csv = shown.csv().splitlines()[0].split(",")
    assert {"mean_kept", "mean_kept_low", "mean_kept_high", "piqa_difference_low", "arc_easy_same_answers"} <= {*csv}


def test_comparisons_are_written_and_read_back(tmp_path):
    models = compared_models()
    (tmp_path / "evaluation.json").write_text(as_json(models, {}))
    record = json.loads((tmp_path / "evaluation.json").read_text())["models"][1]
    assert record["comparison"]["mean"]["is_real"] is True and record["comparison"]["piqa"]["questions"] == 400
    read_back = read(tmp_path).models
    assert [one.questions for one in read_back] == [one.questions for one in models]
    assert read_back[1].kl == {"wikitext2": (0.9, 0.01, "smollm2-135m")}


def test_standard_errors_are_shown_by_recipes():
    rows = [{"point": i} | _row_of([model]) for i, model in enumerate(compared_models()[1:], 1)]
    assert rows[0][f"piqa acc{STDERR}"] == 0.011
    head, *body = stage_cells(rows)
    assert "piqa acc" in head and not any("stderr" in cell for cell in head)
    assert body[0][head.index("piqa acc")] == "0.5 ± 0.011"
    summary = summarize([{"prune.ratio": i} | row for i, row in enumerate(rows)], ["prune.ratio"]).cells(("", ""))
    assert summary[1][summary[0].index("piqa acc")] == "0.5 ± 0.011"
    seeds = [row | {"seed": seed, "prune.ratio": 1} for seed in (0, 1) for row in rows[:1]]
    repeated = summarize(seeds, ["prune.ratio", "seed"]).cells(("", ""))
    assert repeated[1][repeated[0].index("piqa acc")] == "0.5 ± 0", "over seeds, the deviation of the seeds"


def crowd(models: int, tasks: int) -> list[MeasuredModel]:
    return [
        MeasuredModel(
            model=f"m{i}",
            name=f"a_rather_long_name_of_a_model_{i}",
            stage="original" if i == 0 else "pruned",
            byte_perplexity={"wikitext2, 32,768 tokens in 128s": 2.0 + i / 10},
            kl={} if i == 0 else {"wikitext2": (0.3 * i, 0.02, "m0")},
            questions={f"task_{t}": answered(drawn(0.8 - i / 20, 60, seed=t + i)) for t in range(tasks)},
            generation={"repetition": 0.2, "tokens": 31.0},
        )
        for i in range(models)
    ]


@pytest.mark.parametrize(("models", "tasks"), [(2, 1), (3, 7), (12, 20)])
def test_the_figure_of_qualities_reads_well(models, tasks, monkeypatch):
    quality = compare_models(crowd(models, tasks))
    assert quality is not None and quality.drawing is not None
    texts = Texts(quality.drawing, monkeypatch)
    assert texts.boxes and texts.outside() == [] and texts.meeting() == []
    assert len([text for text, _ in texts.boxes if text.startswith("a_rather")]) == min(models, 7), "the legend"
    assert "kept" in quality.drawing.alt and "KL per token, wikitext2" in quality.drawing.alt
    assert "<title>" in quality.drawing.svg() and len(quality.rows) == models


def test_divergence_from_another_model_is_not_shown_as_one_from_the_original():
    models = crowd(3, 1)
    models[2] = replace(models[2], kl={"wikitext2": (0.1, 0.01, "m1")})
    quality = compare_models(models)
    assert quality is not None
    kl = quality.heads.index("KL wikitext2, nats/token")
    assert [row[kl] for row in quality.rows] == ["", "0.300 ± 0.020", ""]


def test_qualities_of_one_model_are_not_compared():
    assert compare_models(crowd(1, 2)) is None and compare_models([]) is None
    only_texts = compare_models(crowd(2, 0))
    assert only_texts is not None and only_texts.task_rows == [] and only_texts.drawing is not None


def test_saved_runs_are_paired_in_the_report(home, tasks, tmp_path):
    """Each model measured by a run of its own; the samples and the comparison are on the page."""
    flags = ["--tasks", "ours", "--include_path", str(tasks), "--seq_len", "16", "--max_windows", "4", "--tokens", "0"]
    for name in ("base", "pruned"):
        argv = ["evaluate", str(home / name), *flags, "--samples", "--new_tokens", "6", "--device", "cpu"]
        assert main([*argv, "--output", str(tmp_path / f"of_{name}")]) == 0
    runs = [str(tmp_path / f"of_{name}") for name in ("base", "pruned")]
    assert main(["report", *runs, "--output", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert '<table id="quality">' in page and "pruned against base: ours " in page and "same answers %" in page
    assert page.count(QUALITY_PROMPTS[3]) == 2
    quality = compare_models(merge_models(map(read, runs)))
    assert quality is not None and [row[0] for row in quality.rows] == ["base", "pruned"]
    assert quality.task_rows[0][:3] == ["pruned", "ours", "20"]
