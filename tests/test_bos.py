"""Windows that begin as the tokenizer begins a text."""

import json

import pytest
import torch
from helpers.models import build, tokens
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import llm_pruner as lp
from llm_pruner.cli import main
from llm_pruner.data import calibration, self_calibration, self_written
from llm_pruner.errors import PrunerError
from llm_pruner.evaluation.perplexity import byte_perplexity, perplexity, windows
from llm_pruner.models.generate import leading_tokens
from llm_pruner.models.loss import IGNORED
from llm_pruner.recovery.tokenize import ExampleFormat, tokenize

BOS, EOS = 100, 101


def make_tokenizer(template="<s> $A"):
    """Build a tokenizer of the numbers 0 to 99, which puts around a text what the template says."""
    words = {str(i): i for i in range(100)} | {"<s>": BOS, "</s>": EOS, "?": 102}
    backend = Tokenizer(models.WordLevel(words, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if template:
        backend.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", BOS), ("</s>", EOS)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@pytest.fixture
def bos_tokenizer():
    return make_tokenizer()


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "numbers.txt"
    path.write_text("\n\n".join(" ".join(str(i % 100) for i in range(7 * k, 7 * k + 60)) for k in range(12)))
    return path


def is_run(row):
    return row == [(row[0] + i) % 100 for i in range(len(row))]


def test_leading_tokens():
    assert leading_tokens(make_tokenizer()) == [BOS]
    assert leading_tokens(make_tokenizer("<s> <s> $A </s>")) == [BOS, BOS]
    assert leading_tokens(make_tokenizer("$A </s>")) == []
    assert leading_tokens(make_tokenizer("")) == []


def test_the_embedded_model_has_none(smollm2):
    _, tokenizer = smollm2
    assert leading_tokens(tokenizer) == []
    rows = [windows(tokenizer, "one two three " * 40, 16, bos=bos) for bos in (True, False)]
    assert torch.equal(*rows)


@pytest.mark.parametrize("seed", [None, 0])
def test_calibration_samples_begin_with_it(bos_tokenizer, text_file, seed):
    ids = calibration(str(text_file), bos_tokenizer, 20, 16, seed=seed)
    assert ids.shape == (20, 16) and (ids[:, 0] == BOS).all()
    assert all(is_run(row) for row in ids[:, 1:].tolist())
    running = calibration(str(text_file), bos_tokenizer, 20, 16, seed=seed, bos=False)
    assert running.shape == (20, 16) and (seed == 0 or 0 < (running[:, 0] == BOS).sum() < 20)
    with pytest.raises(PrunerError, match="samples of 2 tokens hold no text"):
        calibration(str(text_file), make_tokenizer("<s> <s> $A"), 1, 2)


def test_self_written_samples_begin_with_it(bos_tokenizer):
    model = build("llama", vocab_size=103)
    rows = self_written(model, bos_tokenizer, 6, 12)
    assert rows.shape == (6, 12) and (rows[:, 0] == BOS).all()
    more = self_calibration(model, rows, 9, leading=1)
    assert more.shape == (9, 12) and (more[:, 0] == BOS).all()
    assert self_calibration(model, rows, 9).shape == (9, 12)
    without = self_written(model, bos_tokenizer, 6, 12, bos=False)
    assert without.shape == (6, 12) and not (without[:, 0] == BOS).all()


def test_self_written_samples_fill_a_context_of_learned_positions():
    model = build("opt", vocab_size=103, max_position_embeddings=16)
    for length in range(13, 17):
        for leading in range(3):
            assert self_calibration(model, tokens(2, length), 3, leading=leading).shape == (3, length)


def test_windows_begin_with_it_and_count_every_token_once(bos_tokenizer):
    content = " ".join(str(i % 100) for i in range(76))
    ids = windows(bos_tokenizer, content, 16)
    assert (ids[:, 0] == BOS).all() and ids[:, 1:].flatten().tolist() == [i % 100 for i in range(75)]
    overlapping = windows(bos_tokenizer, content, 16, stride=5)
    assert (overlapping[:, 0] == BOS).all() and overlapping[1, 1:].tolist() == list(range(5, 20))
    running = windows(bos_tokenizer, content, 16, bos=False)
    assert running.flatten()[0] == BOS and running.flatten()[1:].tolist() == [i % 100 for i in range(63)]
    with pytest.raises(PrunerError, match="the tokenizer puts 2 tokens before a text"):
        windows(make_tokenizer("<s> <s> $A"), content, 2)


def test_perplexity_per_byte_of_windows_with_it(bos_tokenizer):
    """The token after BOS is predicted, too, so that every token of the text counts once."""
    model = build("llama", vocab_size=103)
    content = " ".join(str(i % 100) for i in range(45))
    ids = windows(bos_tokenizer, content, 16)
    assert perplexity(model, ids).tokens == 45
    with torch.no_grad():
        logits = model(ids).logits[:, :-1].log_softmax(-1)
    total = -logits.gather(-1, ids[:, 1:, None]).sum()
    expected = torch.exp(total / len(content)).item()
    assert byte_perplexity(model, bos_tokenizer, content, 16) == pytest.approx(expected, rel=1e-5)


def test_packed_windows_begin_with_it(bos_tokenizer):
    import datasets

    texts = [" ".join(map(str, range(a, a + n))) for a, n in ((0, 30), (40, 9), (60, 25))]
    data = datasets.Dataset.from_dict({"text": texts})
    rows = tokenize(data, bos_tokenizer, ExampleFormat(cutoff_len=8), "texts")
    ids = [row["input_ids"] for row in rows]
    assert all(len(row) == 8 and row[0] == BOS for row in ids)
    running = [i for text in texts for i in (*map(int, text.split()), EOS)]
    packed = [i for row in ids for i in row if i != BOS]
    assert packed == running[: len(packed)] and len(running) - len(packed) < 8
    begun = [row for row in rows if row["labels"][0] == BOS]
    assert all(row["labels"][0] in (IGNORED, BOS) for row in rows) and 0 < len(begun) < len(rows)
    plain = tokenize(data, bos_tokenizer, ExampleFormat(cutoff_len=8, bos=False), "texts")
    assert not all(row["input_ids"][0] == BOS for row in plain)
    with pytest.raises(PrunerError, match="cutoff_len 2"):
        tokenize(data, make_tokenizer("<s> <s> $A"), ExampleFormat(cutoff_len=2), "texts")


@pytest.fixture
def folder(bos_tokenizer, tmp_path):
    lp.save(build("llama", vocab_size=103), bos_tokenizer, tmp_path / "model")
    return tmp_path / "model"


def test_tables_name_windows_without_it(folder, text_file, tmp_path, capsys):
    flags = ["--datasets", str(text_file), "--seq_len", "16", "--tokens", "0", "--quiet"]
    perplexities = []
    for name, more in (("with", []), ("without", ["--bos", "false"])):
        assert main(["evaluate", str(folder), *flags, *more, "--output", str(tmp_path / name)]) == 0
        evaluation = json.loads((tmp_path / name / "evaluation.json").read_text())["models"][0]
        ((title, result),) = evaluation["perplexity"].items()
        assert ("without BOS" in title) == (name == "without")
        perplexities.append(result["perplexity"])
    assert perplexities[0] != perplexities[1]


@pytest.mark.parametrize(("flags", "begins"), [([], True), (["--preset", "paper"], False), (["--no_bos"], False)])
def test_runs_calibrate_and_measure_as_asked(folder, text_file, tmp_path, flags, begins, monkeypatch):
    samples = []
    from llm_pruner.pruning import run

    original = run.calibration_set
    monkeypatch.setattr(run, "calibration_set", lambda *args: samples.append(original(*args)) or samples[-1])
    common = ["--calib_dataset", str(text_file), "--calib_seq_len", "16", "--num_examples", "32", "--quiet"]
    common += ["--eval_datasets", str(text_file), "--max_seq_len", "16", "--pruning_ratio", "0.25"]
    assert main(["prune", str(folder), "--output", str(tmp_path / "run"), *common, *flags]) == 0
    assert bool((samples[0][:, 0] == BOS).all()) == begins
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert all(("without BOS" in title) != begins for title in metrics["after"]["perplexity"])
    plan = json.loads((tmp_path / "run" / "pruning_plan.json").read_text())
    if begins:
        assert plan["settings"]["refit"]["calibration"]["bos"] is True
