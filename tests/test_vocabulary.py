"""Fewer tokens: every family of tokenizers, trained here."""

import json
from pathlib import Path

import pytest
import torch
from helpers.models import build
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

import llm_pruner as lp
from llm_pruner.checkpoint.apply_files import apply_to_files
from llm_pruner.cli import main
from llm_pruner.data import documents, text
from llm_pruner.errors import PrunerError
from llm_pruner.surgery.tokenizer import Subwords, cut_tokenizer, keeps_words
from llm_pruner.vocabulary import comparison
from llm_pruner.vocabulary.choosing import choose, ids_of_tokenizer, in_scripts
from llm_pruner.vocabulary.counting import Counts, count

TEXTS = [t for _, t in zip(range(120), documents("python-docs"), strict=False)]
TEXTS += ["Größe und Länge, façade, naïve.", "Привет, мир", "你好世界", "שלום"] * 20
SPECIAL = ["<unk>", "<s>", "</s>"]


def byte_level() -> Tokenizer:
    """As GPT-2's, SmolLM2's and Bloom's."""
    out = Tokenizer(models.BPE())
    out.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    out.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    out.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(vocab_size=800, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    out.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return out


def byte_fallback() -> Tokenizer:
    """SentencePiece's BPE as Llama-2's, Gemma's and Mistral's: characters, and bytes for those that it has not."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=700, special_tokens=SPECIAL, limit_alphabet=80, show_progress=False)
    )
    model = json.loads(trained.to_str())["model"]
    vocabulary = dict(model["vocab"])
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    merges = [tuple(pair) for pair in model["merges"]]
    out = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    out.add_special_tokens(SPECIAL)
    out.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(" ", 1, 0)
    out.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    return out


def unigram() -> Tokenizer:
    """As T5's and XGLM's."""
    out = Tokenizer(models.Unigram())
    out.pre_tokenizer = pre_tokenizers.Metaspace()
    out.decoder = decoders.Metaspace()
    out.train_from_iterator(
        TEXTS, trainers.UnigramTrainer(vocab_size=700, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    )
    return out


def wordpiece() -> Tokenizer:
    """As BERT's."""
    out = Tokenizer(models.WordPiece(unk_token="<unk>"))
    out.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    out.decoder = decoders.WordPiece()
    out.train_from_iterator(
        TEXTS, trainers.WordPieceTrainer(vocab_size=900, special_tokens=SPECIAL, show_progress=False)
    )
    out.post_processor = processors.BertProcessing(("</s>", 2), ("<s>", 1))
    return out


FAMILIES = {"byte level": byte_level, "byte fallback": byte_fallback, "unigram": unigram, "wordpiece": wordpiece}


class Family:
    def __init__(self, name: str, folder):
        self.name = name
        fast = FAMILIES[name]()
        self.large = PreTrainedTokenizerFast(
            tokenizer_object=fast, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
        )
        self.words = Subwords(self.large)
        self.counts = count(self.large, ["python-docs"])
        self.kept = choose(self.words, self.counts.values, keep="0.75")
        cut_tokenizer(self.large, self.kept, folder)
        self.small = AutoTokenizer.from_pretrained(folder)
        self.new = {old: position for position, old in enumerate(self.kept)}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    return Family(request.param, tmp_path_factory.mktemp("tokenizer"))


def test_tokens_keep_their_order_and_names(family):
    assert len(family.small) == len(family.kept) < len(family.large)
    assert len(family.kept) == int(0.75 * len(family.words.tokens))
    names = family.large.convert_ids_to_tokens(family.kept)
    assert family.small.convert_ids_to_tokens(range(len(family.kept))) == names
    for role in ("bos_token", "eos_token", "unk_token", "pad_token"):
        assert getattr(family.small, role) == getattr(family.large, role)
        assert getattr(family.small, f"{role}_id") == family.new[getattr(family.large, f"{role}_id")]


def test_every_token_is_still_reached(family):
    """What the old tokenizer makes of a token's own text, the new one does, if all of it stayed."""
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
def test_ten_thousand_texts(name, tmp_path):
    family = Family(name, tmp_path)

    @settings(max_examples=10_000, deadline=None)
    @given(st.text(max_size=60))
    def check(some):
        test_any_text_is_still_written.hypothesis.inner_test(family, some)

    check()


def test_counts_are_those_of_the_tokenizer(family):
    expected = torch.zeros(len(family.large), dtype=torch.long)
    for document in documents("python-docs"):
        ids = torch.tensor(family.large(document, add_special_tokens=False)["input_ids"])
        expected += torch.bincount(ids, minlength=len(expected))
    assert torch.equal(expected, torch.from_numpy(family.counts.values))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A byte-level tokenizer of which tokens were kept for the words alone that they are."""
    out = Family("byte level", tmp_path_factory.mktemp("chained"))
    folder = tmp_path_factory.mktemp("whole")
    out.chained, out.kept = out.small, choose(out.words, out.counts.values, "0.75", whole=out.counts.words)
    out.new = {old: position for position, old in enumerate(out.kept)}
    cut_tokenizer(out.large, out.kept, folder)
    out.small = AutoTokenizer.from_pretrained(folder)
    return out


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


def test_a_word_needs_no_rows_for_what_leads_to_it(whole):
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


def test_rows_without_tokens_do_not_hide_what_went(model_folder, tmp_path):
    """More rows than tokens: the tokenizer is still the original's, and is cut; once, however often it is saved."""
    model, tokenizer = lp.load(str(model_folder))
    graph = lp.trace(model)
    (unit,) = graph.of_kind("vocabulary")
    plan = lp.PruningPlan()
    gone = [i for i in range(300, 700) if i != 700][:3]
    plan.keep(unit, torch.tensor([i for i in range(unit.size) if i not in gone]), graph.shapes)
    assert len(plan.tokens) > len(tokenizer) - 3
    pruned = lp.apply(model, plan)
    lp.save(pruned, tokenizer, tmp_path / "a", plan=plan)
    again, small = lp.load(str(tmp_path / "a"))
    assert len(small) == len(tokenizer) - 3
    text = tokenizer.decode([i for i in range(400, 500)])
    assert small.decode(small(text)["input_ids"], skip_special_tokens=True) == text
    lp.save(again, small, tmp_path / "b", plan=lp.PruningPlan.load(tmp_path / "a" / "pruning_plan.json"))
    assert lp.load(str(tmp_path / "b"))[1].get_vocab() == small.get_vocab()


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
    for wrong in ("many", "-3", "1.5", "coverage=2", "coverage"):
        with pytest.raises(PrunerError, match="is not valid: give 15000"):
            choose(words, counts, keep=wrong)


def closure(words, kept, counts, least):
    """What is kept only because others are merged from it."""
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


def test_the_tokens_of_a_smaller_tokenizer(family):
    assert ids_of_tokenizer(family.words, Subwords(family.small)) == set(family.kept)
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"strange": 0, "words": 1}, [])))
    with pytest.raises(PrunerError, match="2 of its 2 tokens are missing there, the first 'strange'"):
        ids_of_tokenizer(family.words, Subwords(other))


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


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A tiny Llama with a byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level(), bos_token="<s>", eos_token="</s>")
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 8,  # rows that no token has
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=[2, 700],
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    model.generation_config.suppress_tokens = [1, 799]
    lp.save(model, tokenizer, folder / "model")
    return folder / "model"


@pytest.mark.parametrize("tied", [False, True])
def test_the_command(tied, model_folder, tmp_path):
    flags = ["--corpus", "python-docs", "--keep", "0.9", "--save_counts", str(tmp_path / "counts.json")]
    folder = model_folder
    if tied:
        model, tokenizer = lp.load(str(model_folder))
        config = LlamaConfig.from_dict({**model.config.to_dict(), "tie_word_embeddings": True})
        folder = tmp_path / "tied"
        lp.save(LlamaForCausalLM(config).eval(), tokenizer, folder)
    assert main(["vocab", str(folder), *flags, "--output_dir", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "vocabulary.json").read_text())
    compared = found["comparison"]
    assert found["tokens_after"] == int(0.9 * 800)
    assert compared["compared"] > 0 and compared["largest_difference"] < 1e-6
    assert compared["generations_equal"] == compared["generations"]
    assert 0 <= compared["tokenized_otherwise"] < 1 and compared["fertility_after"] >= compared["fertility_before"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    kept = lp.PruningPlan.load(tmp_path / "out" / "pruning_plan.json").tokens
    assert model.config.vocab_size == len(tokenizer) == len(kept) == found["tokens_after"]
    assert model.config.eos_token_id == [kept.index(2), kept.index(700)]
    assert model.config.bos_token_id == kept.index(1)
    original, large = lp.load(str(folder))
    ids = [i for i in large(text("python-docs", "test")[:3000])["input_ids"] if i in kept][:100]
    with torch.no_grad():
        expected = original(torch.tensor([ids])).logits[..., kept]
        logits = model(torch.tensor([[kept.index(i) for i in ids]])).logits
    assert (logits - expected).abs().max() < 1e-6
    # The same by the plan alone, file by file.
    apply_to_files(lp.PruningPlan.load(tmp_path / "out" / "pruning_plan.json"), str(folder), tmp_path / "files")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "files")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert AutoTokenizer.from_pretrained(tmp_path / "files").get_vocab() == tokenizer.get_vocab()


def test_both_models_are_measured_on_the_same_text(model_folder, tmp_path, monkeypatch):
    texts, measure = [], comparison.byte_perplexity

    def noted(model, tokenizer, held_out, *window):
        texts.append(held_out)
        return measure(model, tokenizer, held_out, *window)

    monkeypatch.setattr(comparison, "byte_perplexity", noted)
    flags = ["--corpus", "python-docs", "--keep", "0.6", "--max_windows", "3"]
    assert main(["vocab", str(model_folder), *flags, "--output_dir", str(tmp_path / "out")]) == 0
    before, after = texts
    assert before == after and before in text("python-docs", "test")
    _, large = lp.load(str(model_folder))
    assert len(large(before, add_special_tokens=False)["input_ids"]) < 4 * comparison.WINDOW


def test_suppressed_tokens_move_or_go(model_folder, tmp_path):
    flags = ["--corpus", "python-docs", "--keep", "0.7", "--output_dir", str(tmp_path / "out")]
    assert main(["vocab", str(model_folder), *flags]) == 0
    model, _ = lp.load(str(tmp_path / "out"))
    kept = lp.PruningPlan.load(tmp_path / "out" / "pruning_plan.json").tokens
    expected = [kept.index(i) for i in (1, 799) if i in kept]
    assert model.generation_config.suppress_tokens == expected


def test_a_token_that_the_config_names_cannot_go():
    model = build("llama")
    graph = lp.trace(model)
    (unit,) = graph.of_kind("vocabulary")
    plan = lp.PruningPlan()
    plan.keep(unit, torch.arange(1, 96), graph.shapes)
    with pytest.raises(PrunerError, match="drops token 0, which the config names"):
        lp.apply(model, plan)


def test_vocabulary_and_neurons_in_one_plan():
    model = build("llama_grouped")
    graph = lp.trace(model)
    plan = lp.select(graph, lp.score(model, graph, criterion="l2"), 0.5)
    (unit,) = graph.of_kind("vocabulary")
    plan.keep(unit, torch.arange(0, 80), graph.shapes)
    pruned = lp.apply(model, plan)
    assert pruned.config.vocab_size == 80 and pruned.lm_head.weight.shape == (80, 32)
    ids = torch.arange(2, 14)[None]
    narrow = lp.apply(model, lp.select(graph, lp.score(model, graph, criterion="l2"), 0.5))
    with torch.no_grad():
        assert torch.allclose(pruned(ids).logits, narrow(ids).logits[..., :80], atol=1e-6)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "say which tokens stay"),
        (["--keep", "0.5"], "give --corpus"),
        (["--keep", "0.5", "--corpus", "/no/file.txt"], "no data set '/no/file.txt'"),
        (["--languages", "xx"], "--languages 'xx' is unknown"),
        (["--scripts", "Latin", "--keep_tokens", "/no/file"], "cannot read /no/file"),
        (["--kep", "3"], "did you mean --keep?"),
        (["--keep", "inf", "--corpus", "python-docs"], "is not valid: give 15000"),
        (["--to_tokenizer", "/no/tokenizer"], "there is no model folder"),
    ],
)
def test_bad_input_of_the_command(argv, message, model_folder, tmp_path, capsys):
    assert main(["vocab", str(model_folder), *argv, "--output_dir", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_empty_corpus(model_folder, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("")
    flags = ["--corpus", str(tmp_path / "empty.txt"), "--keep", "0.5", "--output_dir", str(tmp_path / "out")]
    assert main(["vocab", str(model_folder), *flags]) == 2
    assert "the corpus is empty" in capsys.readouterr().err


def test_a_tokenizer_without_a_fast_form():
    with pytest.raises(PrunerError, match="has no fast form: convert it"):
        Subwords(object())  # type: ignore[arg-type]
    word_level = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")))
    with pytest.raises(PrunerError, match="WordLevel tokenizer cannot lose tokens"):
        Subwords(word_level)
