"""UL2's denoisers against examples by hand, and the variants against what they promise."""

import random
from collections import Counter
from itertools import pairwise

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import llm_pruner as lp
from llm_pruner.recovery.objectives import UL2, Denoiser, Vocabulary, corrupted, denoised, rates, spans

PLAIN = Vocabulary(tuple(range(1000, 1100)), (1,), {"R": (), "S": (), "X": ()})
MODAL = Vocabulary(tuple(range(1000, 1100)), (1,), {"R": (901,), "S": (902,), "X": (903,)})


def test_gaps_by_hand():
    ids = [10, 11, 12, 13, 14, 15, 16, 17]
    source, target = corrupted(ids, [(1, 3), (6, 7)], (1000, 1001, 1002))
    assert source == [10, 1000, 13, 14, 15, 1001, 17]
    assert target == [1000, 11, 12, 1001, 16]


def test_the_sequential_denoiser_by_hand():
    assert spans(8, Denoiser("S", 0, 0.25), random.Random(0)) == [(6, 8)]
    assert corrupted(list(range(8)), [(6, 8)], (1000,)) == ([0, 1, 2, 3, 4, 5, 1000], [1000, 6, 7])


@pytest.mark.parametrize("denoiser", UL2)
@pytest.mark.parametrize("length", (2, 5, 100, 512))
def test_spans_take_what_the_rate_says(denoiser, length):
    for seed in range(20):
        gaps = spans(length, denoiser, random.Random(seed))
        assert sum(end - start for start, end in gaps) == min(max(round(length * denoiser.rate), 1), length - 1)
        edges = [0, *(edge for gap in gaps for edge in gap)]
        assert all(a < b for a, b in pairwise(edges)) and edges[-1] <= length
        if denoiser.span and length == 512:
            assert len(gaps) == pytest.approx(512 * denoiser.rate / denoiser.span, abs=1)


def filled(example, vocabulary):
    """The text again: every sentinel of the input replaced by what the target says of it."""
    answers, current = {}, None
    for token in example["labels"][: -len(vocabulary.eos)]:
        if token in vocabulary.sentinels:
            current = answers.setdefault(token, [])
        else:
            current.append(token)
    out = []
    for token in example["input_ids"][: -len(vocabulary.eos)]:
        out += answers.get(token, [token] if token < 900 else [])
    return out


@pytest.mark.parametrize("objective", ("ul2", "d_ul2", "o_ul2"))
def test_nothing_is_lost(objective):
    windows = [[(7 * i + j) % 800 + 10 for j in range(64)] for i in range(100)]
    found = list(denoised(windows, objective, MODAL, seed=3))
    told = Counter(token for example in found for token in filled(example, MODAL))
    assert told == Counter(token for window in windows for token in window)
    if objective != "o_ul2":
        assert [filled(e, MODAL) for e in found] == windows
        assert {e["input_ids"][0] for e in found} == {901, 902, 903}
    assert list(denoised(windows, objective, MODAL, seed=3)) == found
    assert list(denoised(windows, objective, MODAL, seed=4)) != found


def targets_by_family(objective):
    windows = [[5] * 256] * 3000
    out = Counter()
    for example in denoised(windows, objective, MODAL, seed=0):
        out[{901: "R", 902: "S", 903: "X"}[example["input_ids"][0]]] += example["labels"].count(5)
    return {family: count / sum(out.values()) for family, count in out.items()}


def test_mixing_rates():
    assert sum(rates("ul2").values()) == pytest.approx(1) == sum(rates("d_ul2").values())
    plain, balanced = targets_by_family("ul2"), targets_by_family("d_ul2")
    weights = {"R": 0.3, "S": 0.25, "X": 1.65}
    assert plain == pytest.approx({f: w / sum(weights.values()) for f, w in weights.items()}, abs=0.03)
    assert balanced == pytest.approx({"R": 1 / 3, "S": 1 / 3, "X": 1 / 3}, abs=0.04)


def padding(examples, batch=8):
    """Share of encoder and decoder positions that are padding in batches."""
    used = there = 0
    for i in range(0, len(examples) - batch + 1, batch):
        part = examples[i : i + batch]
        for key in ("input_ids", "labels"):
            used += sum(len(e[key]) for e in part)
            there += batch * max(len(e[key]) for e in part)
    return 1 - used / there


def test_packing_leaves_little_padding():
    windows = [[5] * 256] * 600
    plain, packed = (list(denoised(windows, o, PLAIN, seed=0)) for o in ("ul2", "o_ul2"))
    assert padding(packed) < 0.1 < 0.25 < padding(plain)
    assert max(len(e["input_ids"]) for e in packed) <= 257 and max(len(e["labels"]) for e in packed) <= 129


def test_special_tokens():
    words = {token: i for i, token in enumerate(["<unk>", "</s>", "a", "<extra_id_1>", "<extra_id_0>", "[S2S]"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="<unk>")
    found = Vocabulary.of(tokenizer)
    assert found == Vocabulary((4, 3), (1,), {"R": (), "S": (5,), "X": ()})
    words = {token: i for i, token in enumerate(["<unk>", "</s>"])}
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")))
    with pytest.raises(lp.PrunerError, match="UL2 needs sentinel tokens"):
        Vocabulary.of(bare)
