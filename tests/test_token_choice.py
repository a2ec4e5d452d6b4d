"""Counting tokens and choosing which to keep."""

import json
from pathlib import Path

import pytest
import torch
from helpers.tiny_tokenizers import FAMILIES, TEXTS, family_of
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llm_pruner.data import documents
from llm_pruner.errors import PrunerError
from llm_pruner.surgery.tokenizer import Subwords, cut_document
from llm_pruner.vocabulary.choosing import choose, ids_of_tokenizer, in_scripts
from llm_pruner.vocabulary.counting import Counts, count


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return family_of(request.param)


def test_counts_are_those_of_the_tokenizer(family):
    expected = torch.zeros(len(family.large), dtype=torch.long)
    for document in documents("python-docs"):
        ids = torch.tensor(family.large(document, add_special_tokens=False)["input_ids"])
        expected += torch.bincount(ids, minlength=len(expected))
    assert torch.equal(expected, torch.from_numpy(family.counts.values))


def test_whole_words_are_counted(family):
    expected = torch.zeros(len(family.large), dtype=torch.long)
    for document in documents("python-docs"):
        encoding = family.large(document, add_special_tokens=False)
        of = [-1, *encoding.word_ids(), -1]
        alone = [i for at, i in enumerate(encoding["input_ids"], 1) if of[at - 1] != of[at] != of[at + 1]]
        expected += torch.bincount(torch.tensor(alone, dtype=torch.long), minlength=len(expected))
    if not family.words.by_words:
        expected.zero_()
    assert torch.equal(expected, torch.from_numpy(family.counts.words))


def test_counting_goes_on_where_it_stopped(family, tmp_path, monkeypatch):
    lines = [json.dumps({"text": t}) for t in TEXTS]
    (tmp_path / "all.jsonl").write_text("\n".join(lines))
    whole = count(family.large, [str(tmp_path / "all.jsonl")])
    monkeypatch.setattr("llm_pruner.vocabulary.counting.DOCUMENTS_PER_BATCH", 10)
    monkeypatch.setattr("llm_pruner.vocabulary.counting.KEEP_EVERY", 1)
    saved = Counts.save

    def stop(self, *args):
        saved(self, *args)
        if self.sources[str(tmp_path / "all.jsonl")].read == 50:
            raise KeyboardInterrupt

    monkeypatch.setattr(Counts, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        count(family.large, [str(tmp_path / "all.jsonl")], tmp_path / "counts.json")
    again = count(family.large, [str(tmp_path / "all.jsonl")], tmp_path / "counts.json")
    assert (again.values == whole.values).all() and again.sources[str(tmp_path / "all.jsonl")].read == len(TEXTS)


def test_counts_of_several_sources_stay_apart(family, tmp_path):
    names = [str(tmp_path / f"{name}.txt") for name in "ab"]
    for name, content in zip(names, ("one two three", "four"), strict=True):
        Path(name).write_text(content)
    alone = [count(family.large, [name]).values for name in names]
    file = tmp_path / "counts.json"
    assert (count(family.large, names[:1], file).values == alone[0]).all()
    assert (count(family.large, names[1:], file).values == alone[1]).all()  # and not what was not asked for
    assert (count(family.large, names, file).values == alone[0] + alone[1]).all()
    Path(names[0]).write_text("four four")  # another text by now
    assert (count(family.large, names[:1], file).values == count(family.large, names[:1]).values).all()


def test_ways_to_choose(family):
    words, counts = family.words, family.counts.values
    everything = choose(words, counts)
    covering = choose(words, counts, keep="coverage=0.99")
    share = counts[[i for i in covering if i < len(counts)]].sum() / counts.sum()
    assert share >= 0.99 and len(covering) < len(everything)
    often = choose(words, counts, min_count=5)
    assert all(counts[i] >= 5 for i in set(often) - words.required - closure(words, often, counts, 5))
    assert len(choose(words, counts, keep="600")) <= 600
    with pytest.raises(PrunerError, match="have to stay"):
        choose(words, counts, keep="2")
    with pytest.raises(PrunerError, match=r"--keep 1000000 is above the \d+ tokens of the model"):
        choose(words, counts, keep="1000000")
    for wrong in ("many", "-3", "1.5", "coverage=2", "coverage"):
        with pytest.raises(PrunerError, match="is not valid: give 15000"):
            choose(words, counts, keep=wrong)


def closure(words, kept, counts, least):
    """Return tokens that are kept only because others are merged from them."""
    out = set()
    for i in kept:
        if counts[i] >= least:
            out |= words.needs(i) or set()
    for i in words.required:
        out |= words.needs(i) or set()
    return out


def test_scripts(family):
    latin = in_scripts(family.words, family.large, ["latin"])
    written = {family.large.decode([i]) for i in latin}
    assert not any("п" in w or "你" in w for w in written) and any("the" in w for w in written)
    with pytest.raises(PrunerError, match="--scripts 'Klingon' is unknown"):
        in_scripts(family.words, family.large, ["Klingon"])


def test_characters_that_the_corpus_lacks_may_go(family):
    """Text in the characters of the corpus stays writable, and other text becomes unknown."""
    counts = torch.bincount(torch.tensor(family.large("the cat sat on a mat")["input_ids"])).numpy()
    if family.words.falls_back_on_bytes:
        with pytest.raises(PrunerError, match="falls back on bytes"):
            family.words.unseen_characters(counts)
        return
    unseen = family.words.unseen_characters(counts)
    assert unseen < family.words.required and not unseen & family.words.added
    written = {family.large.decode([i]).strip("▁# ") for i in unseen}
    assert written >= set("ßмр好") and not written & set("thecatsonm")
    assert not family.words.unseen_characters([1] * family.words.size)
    kept = choose(family.words, counts, keep=str(len(family.words.required) - len(unseen) + 30), given_up=unseen)
    cut = Tokenizer.from_str(json.dumps(cut_document(family.words, kept)))
    unknown = cut.token_to_id("<unk>")
    assert unknown not in cut.encode("most cats on that hat").ids and unknown in cut.encode("好").ids


def test_tokens_that_no_text_has_come_last():
    """As BERT's ``[unused0]``, whose brackets are split off; the earlier of the others are the more frequent ones."""
    words = ["[UNK]", "[ab]", "[", "a", "b", "]", "##a", "##b", "##]", "ab", "ba"]
    inner = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    subwords = Subwords(PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]"))
    kept = choose(subwords, torch.zeros(len(words), dtype=torch.long).numpy(), keep=str(len(subwords.required) + 1))
    assert [words[i] for i in kept if i not in subwords.required] == ["ab"]


def test_the_tokens_of_a_smaller_tokenizer(family):
    assert ids_of_tokenizer(family.words, Subwords(family.small)) == set(family.kept)
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"strange": 0, "words": 1}, [])))
    with pytest.raises(PrunerError, match="2 of its 2 tokens are missing there, the first 'strange'"):
        ids_of_tokenizer(family.words, Subwords(other))
