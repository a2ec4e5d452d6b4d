"""Texts and calibration sets."""

import hashlib
import json

import pytest
import torch
from helpers.architectures import tiny_model
from helpers.models import build, tokens
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llm_pruner.data import OPENINGS, calibration, documents, self_calibration, self_written, text
from llm_pruner.errors import PrunerError
from llm_pruner.evaluation.perplexity import perplexity
from llm_pruner.pruning.calibration import available_text
from llm_pruner.pruning.settings import CalibrationSettings


@pytest.fixture
def tokenizer():
    words = Tokenizer(models.WordLevel({str(i): i for i in range(100)} | {"?": 100}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words)


def numbers(start, count):
    return " ".join(str(i % 100) for i in range(start, start + count))


def test_the_embedded_text_is_split_by_topic():
    train, test = list(documents("python-docs", "train")), list(documents("python-docs", "test"))
    assert len(train) > 3 * len(test) > 0 and not set(train) & set(test)
    assert text("python-docs").startswith(test[0])


def test_local_files(tmp_path):
    rows = ["first", "second"]
    (tmp_path / "a.txt").write_text("first\n\nsecond\n")
    (tmp_path / "a.json").write_text(json.dumps([{"text": r} for r in rows]))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"sentence": r}) + "\n" for r in rows))
    for suffix in ("txt", "json", "jsonl"):
        assert [d.strip() for d in documents(str(tmp_path / f"a.{suffix}"))] == rows
    assert text(str(tmp_path / "a.txt")) == "first\n\nsecond\n"
    assert text(str(tmp_path / "a.json")) == "first\n\nsecond"


def test_the_first_long_enough_documents_are_cut(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join([numbers(0, 5), numbers(10, 12), numbers(30, 8)]))
    assert calibration(str(path), tokenizer, 2, 8).tolist() == [list(range(10, 18)), list(range(30, 38))]


def test_random_samples_are_seeded(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(numbers(i, 40) for i in range(20)))
    a, b, c = (calibration(str(path), tokenizer, 4, 8, seed=s).tolist() for s in (1, 1, 2))
    assert a == b != c
    assert all(row == [(row[0] + i) % 100 for i in range(8)] for row in a)


def test_random_samples_use_the_whole_of_a_document(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text(numbers(0, 90))
    for seed in range(5):
        rows = calibration(str(path), tokenizer, 5, 8, seed=seed)
        assert len({row[0] for row in rows.tolist()}) == 5


@pytest.mark.parametrize("chunk", (1, 2, 3, 7, 10**6))
def test_paragraphs_are_read_as_they_come(chunk, tmp_path, monkeypatch):
    content = "a\n\n\nb\nc\n\n\n\nd\n\n"
    (tmp_path / "a.txt").write_text(content)
    monkeypatch.setattr("llm_pruner.corpora.CHUNK", chunk)
    assert list(documents(str(tmp_path / "a.txt"))) == [p for p in content.split("\n\n") if p.strip()]


def test_too_short_a_text_is_refused_with_its_length(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text(numbers(0, 9))
    with pytest.raises(PrunerError, match=r"1 samples of 8 tokens .*longest document has 9.* 2 are needed"):
        calibration(str(path), tokenizer, 2, 8)
    with pytest.raises(PrunerError, match="at least 1 sample"):
        calibration(str(path), tokenizer, 0, 8)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "[", "cannot read .*a.json"),
        ("a.json", '[{"body": "x"}]', "it has body"),
        ("a.json", "[]", "no rows"),
        ("a.json", "[3]", "must hold texts"),
        ("a.csv", "x", "cannot read"),
    ],
)
def test_unreadable_files(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(PrunerError, match=message):
        list(documents(str(tmp_path / name)))
    with pytest.raises(PrunerError, match="no data set"):
        documents("wikitext3")


def test_the_hub_out_of_reach_says_what_to_do(monkeypatch):
    import datasets

    def refuse(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    for name in ("wikitext2", "ptb", "c4", "bookcorpus"):
        with pytest.raises(PrunerError, match=f"{name} could not be fetched.*local"):
            list(documents(name))


def test_hub_data_sets_need_no_script(monkeypatch):
    """Every hub data set is asked for as plain files, in the split asked for."""
    import datasets

    seen = []

    def stub(loader, config=None, data_files=None, split=None, streaming=None):
        seen.append((loader, config, data_files, split))
        return [{"text": "t", "sentence": "t"}]

    monkeypatch.setattr(datasets, "load_dataset", stub)
    assert [list(documents(n, "test")) for n in ("wikitext2", "ptb", "c4")] == [["t"]] * 3
    assert seen[0] == ("Salesforce/wikitext", "wikitext-2-raw-v1", None, "test")
    assert seen[1][0] == "parquet" and "validation/0000.parquet" in seen[1][2]
    assert seen[2][0] == "json" and "c4-validation" in seen[2][2]
    with pytest.raises(PrunerError, match="no held-out part"):
        list(documents("bookcorpus", "test"))
    assert list(documents("c4", most=0)) == [] and "00000" in seen[3][2]
    assert list(documents("c4")) == ["t"] and "c4-train.*" in seen[4][2]  # to train on: all of it


def test_samples_that_the_model_writes_itself():
    model, ids = build("llama"), tokens(5, 16)
    state = torch.random.get_rng_state()
    a, b, c = (self_calibration(model, ids, 12, seed) for seed in (1, 1, 2))
    assert a.shape == (12, 16) and torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(torch.random.get_rng_state(), state)
    # They are drawn after the prompts, so that the model finds them likelier than other text.
    joined = torch.cat([ids.repeat(3, 1)[:12, -4:], a], 1)
    other = torch.cat([ids.repeat(3, 1)[:12, -4:], tokens(12, 16, seed=7)], 1)
    assert perplexity(model, joined).loss < perplexity(model, other).loss
    with pytest.raises(PrunerError, match="does not continue a text"):
        self_calibration(tiny_model("t5:seq2seq"), ids, 4)


def test_the_embedded_texts_are_fixed():
    """The same characters on every machine: numbers measured on them compare."""
    every = {name: [*documents(name, "train"), *documents(name, "test")] for name in ("general", "python-docs")}
    found = {name: hashlib.sha256("\0".join(docs).encode()).hexdigest()[:16] for name, docs in every.items()}
    assert found == {"general": "17f6ff27418aee44", "python-docs": "c693ff1b0889e2d0"}
    assert not set(documents("general", "train")) & set(documents("general", "test"))


def test_text_of_the_model_itself_is_for_calibration_only():
    with pytest.raises(PrunerError, match="'self' is written by the model"):
        documents("self")


def test_a_model_writes_a_calibration_set(tokenizer):
    model = build("llama", vocab_size=101)
    a, b, c = (self_written(model, tokenizer, 10, 12, seed=seed) for seed in (1, 1, 2))
    assert a.shape == (10, 12) and torch.equal(a, b) and not torch.equal(a, c)
    openings = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in OPENINGS[:5]]
    tokenizer.bos_token = "0"
    rows = self_written(model, tokenizer, 10, 12).tolist()
    assert all(row[: len(opening)] == opening for row, opening in zip(rows[1::2], openings, strict=True))
    with pytest.raises(PrunerError, match="does not continue a text"):
        self_written(tiny_model("t5:seq2seq"), tokenizer, 4, 8)


def test_a_model_writes_as_much_as_its_context_holds(tokenizer):
    model = build("gpt2", vocab_size=len(tokenizer), n_positions=32)
    rows = self_written(model, tokenizer, 4, 32)
    assert rows.shape == (4, 32)
    assert torch.equal(rows[:, :20], self_written(model, tokenizer, 4, 20))


def settings(**changes):
    return CalibrationSettings(**{"dataset": "c4", "samples": 4, "tokens": 8, "replaceable": True} | changes)


@pytest.mark.parametrize(
    ("dataset", "model", "offload", "used"),
    [
        ("c4", "llama", False, "self"),
        ("self", "llama", False, "self"),
        ("self", "llama", True, "general"),
        ("self", "t5:seq2seq", False, "general"),
        ("bookcorpus", "t5:seq2seq", False, "general"),
    ],
)
def test_a_text_that_is_not_available_is_replaced_and_named(dataset, model, offload, used, caplog, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", unreachable)
    model = build(model) if model == "llama" else tiny_model(model)
    with caplog.at_level("INFO", "llm_pruner"):
        chosen = available_text(settings(dataset=dataset), model, offload)
    assert chosen.dataset == used and not chosen.replaceable
    assert (f"calibration text: {dataset} cannot be reached" in caplog.text) == (dataset in ("c4", "bookcorpus"))
    assert ("the embedded text general" in caplog.text) == (used == "general")


def unreachable(*args, **kwargs):
    raise ConnectionError("no network")


def test_a_text_that_the_user_named_is_never_replaced():
    named = settings(dataset="self", replaceable=False)
    assert available_text(named, tiny_model("t5:seq2seq")) == named
