"""Tokenizers of every family with fewer tokens: what they write and read is as before."""

import json

import pytest
from helpers.tiny_tokenizers import FAMILIES, TEXTS, Family, family_of
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen3Config

from llm_pruner.data import documents, text
from llm_pruner.errors import PrunerError
from llm_pruner.surgery.tokenizer import Subwords, cut_tokenizer, keeps_words
from llm_pruner.vocabulary.choosing import choose
from llm_pruner.vocabulary.counting import count


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return family_of(request.param)


def test_tokens_keep_their_order_and_names(family):
    assert len(family.small) == len(family.kept) < len(family.large)
    assert len(family.kept) == int(0.75 * len(family.words.tokens))
    names = family.large.convert_ids_to_tokens(family.kept)
    assert family.small.convert_ids_to_tokens(range(len(family.kept))) == names
    for role in ("bos_token", "eos_token", "unk_token", "pad_token"):
        assert getattr(family.small, role) == getattr(family.large, role)
        assert getattr(family.small, f"{role}_id") == family.new[getattr(family.large, f"{role}_id")]


def test_every_token_is_still_reached(family):
    """The new tokenizer splits the text of a token as the old one did, if all pieces were kept."""
    old = Tokenizer.from_str(bare(family.words.document))
    new = Tokenizer.from_str(bare(Subwords(family.small).document))
    unreached = 0
    for i in family.kept:
        word = family.words.tokens[i]
        if i in family.words.added or word.startswith("<0x"):
            continue
        before = old.encode(word, add_special_tokens=False).ids
        if before == [i]:
            assert new.encode(word, add_special_tokens=False).ids == [family.new[i]], word
        else:
            unreached += 1
    assert unreached <= 0.02 * len(family.kept)


def bare(document: dict) -> str:
    """The tokenizer's model alone, so that a token's own writing can be given to it."""
    return json.dumps(
        {**document, "pre_tokenizer": None, "normalizer": None, "added_tokens": [], "post_processor": None}
    )


def test_text_of_kept_tokens_is_tokenized_as_before(family):
    same = 0
    for piece in text("python-docs", "test")[:20000].split("\n"):
        ids = family.large(piece)["input_ids"]
        if set(ids) <= family.new.keys():
            assert family.small(piece)["input_ids"] == [family.new[i] for i in ids]
            same += len(ids) > 3
    assert same > 20


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=40))
def test_any_text_is_still_written(family, some):
    """No unknown token where there was none, and decoding gives the same as before."""
    old, new = family.large(some, add_special_tokens=False), family.small(some, add_special_tokens=False)
    if family.large.unk_token_id not in old["input_ids"]:
        assert family.small.unk_token_id not in new["input_ids"]
        assert family.small.decode(new["input_ids"]) == family.large.decode(old["input_ids"])


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_ten_thousand_texts(name):
    family = family_of(name)

    @settings(max_examples=10_000, deadline=None)
    @given(st.text(max_size=60))
    def check(some):
        test_any_text_is_still_written.hypothesis.inner_test(family, some)

    check()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A byte-level tokenizer of which tokens were kept for the words alone that they are."""
    out = Family("byte level")
    folder = tmp_path_factory.mktemp("whole")
    out.chained, out.kept = out.small, choose(out.words, out.counts.values, "0.75", whole=out.counts.words)
    out.new = {old: position for position, old in enumerate(out.kept)}
    cut_tokenizer(out.large, out.kept, folder)
    out.small = AutoTokenizer.from_pretrained(folder)
    return out


def test_a_word_needs_no_rows_for_the_tokens_that_it_is_merged_from(whole):
    """More text is written as before, and with fewer tokens, than where each token has all that it is merged from."""
    assert len(whole.kept) == len(whole.chained)
    alone = [i for i in whole.kept if not set(whole.words.constituents(i)) <= whole.new.keys()]
    assert len(alone) > 10
    for i in alone:
        word = whole.large.decode([i])
        assert whole.large(word, add_special_tokens=False)["input_ids"] == [i]
        assert whole.small(word, add_special_tokens=False)["input_ids"] == [whole.new[i]]
    texts = list(documents("python-docs"))
    sizes = [sum(map(len, t(texts)["input_ids"])) for t in (whole.large, whole.small, whole.chained)]
    assert sizes[0] < sizes[1] < sizes[2]


def test_text_of_words_and_reached_tokens_is_tokenized_as_before(whole):
    reached = {i for i in whole.kept if whole.words.needs(i) <= whole.new.keys()}
    same = 0
    for piece in text("python-docs", "test")[:20000].split("\n"):
        encoding = whole.large(piece, add_special_tokens=False)
        of = [-1, *encoding.word_ids(), -1]
        ids = encoding["input_ids"]
        if all(i in reached or (i in whole.new and of[at - 1] != of[at] != of[at + 1]) for at, i in enumerate(ids, 1)):
            assert whole.small(piece, add_special_tokens=False)["input_ids"] == [whole.new[i] for i in ids]
            same += len(ids) > 3
    assert same > 20


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=40))
def test_any_text_is_still_written_with_words_kept_alone(whole, some):
    assert whole.small.decode(whole.small(some, add_special_tokens=False)["input_ids"]) == some


def test_a_tokenizer_with_words_kept_alone_is_cut_again(whole, tmp_path):
    words, counts = Subwords(whole.small), count(whole.small, ["python-docs"])
    kept = choose(words, counts.values, "0.8", whole=counts.words)
    assert len(kept) == int(0.8 * len(whole.kept))
    cut_tokenizer(whole.small, kept, tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for i in kept:
        word = whole.small.decode([i])
        if whole.small(word, add_special_tokens=False)["input_ids"] == [i]:
            assert again(word, add_special_tokens=False)["input_ids"] == [kept.index(i)]
    assert again.decode(again(TEXTS[0], add_special_tokens=False)["input_ids"]) == TEXTS[0]


def test_words_stay_alone_only_where_the_tokenizer_comes_back_with_them(whole):
    """Beside a config of Qwen2, transformers builds that model's own tokenizer whatever the files say."""
    assert keeps_words(whole.large, LlamaConfig()) and keeps_words(whole.large, Qwen3Config())
    assert not keeps_words(whole.large, Qwen2Config())


def test_the_sentencepiece_file_is_cut_too(tmp_path):
    pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf", reason="protobuf is not installed")
    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
    from sentencepiece import sentencepiece_model_pb2 as pb2

    (tmp_path / "corpus.txt").write_text("\n".join(TEXTS))
    SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"), model_prefix=str(tmp_path / "sp"), vocab_size=600, model_type="unigram"
    )
    proto = pb2.ModelProto()
    proto.ParseFromString((tmp_path / "sp.model").read_bytes())
    fast = Tokenizer(models.Unigram([(p.piece, p.score) for p in proto.pieces], 0))
    fast.add_special_tokens(["<unk>", "<s>", "</s>"])
    large = PreTrainedTokenizerFast(tokenizer_object=fast, unk_token="<unk>")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tokenizer.model").write_bytes((tmp_path / "sp.model").read_bytes())
    kept = choose(Subwords(large), count(large, ["python-docs"]).values, keep="0.7")
    cut_tokenizer(large, kept, tmp_path / "out")
    small = SentencePieceProcessor(model_file=str(tmp_path / "out" / "tokenizer.model"))
    assert small.vocab_size() == len(kept)
    assert [small.id_to_piece(i) for i in range(len(kept))] == large.convert_ids_to_tokens(kept)


def test_a_tokenizer_without_a_fast_form():
    with pytest.raises(PrunerError, match="has no fast form: convert it"):
        Subwords(object())  # type: ignore[arg-type]
    word_level = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")))
    with pytest.raises(PrunerError, match="WordLevel tokenizer cannot lose tokens"):
        Subwords(word_level)
