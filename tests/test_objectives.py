"""UL2's denoisers against examples by hand, and the properties of its two variants."""

import random
from collections import Counter
from itertools import pairwise

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import llm_pruner as lp
from llm_pruner.recovery.objectives import UL2, Denoiser, Vocabulary, corrupt, denoise, draw_spans, mixing_rates

PLAIN = Vocabulary(tuple(range(1000, 1100)), (1,), {"R": (), "S": (), "X": ()})
MODAL = Vocabulary(tuple(range(1000, 1100)), (1,), {"R": (901,), "S": (902,), "X": (903,)})


def test_spans_become_sentinels():
    ids = [10, 11, 12, 13, 14, 15, 16, 17]
    source, target = corrupt(ids, [(1, 3), (6, 7)], (1000, 1001, 1002))
    assert source == [10, 1000, 13, 14, 15, 1001, 17]
    assert target == [1000, 11, 12, 1001, 16]


def test_the_sequential_denoiser_takes_the_end():
    assert draw_spans(8, Denoiser("S", 0, 0.25), random.Random(0)) == [(6, 8)]
    assert corrupt(list(range(8)), [(6, 8)], (1000,)) == ([0, 1, 2, 3, 4, 5, 1000], [1000, 6, 7])


@pytest.mark.parametrize("denoiser", UL2)
@pytest.mark.parametrize("length", (2, 5, 100, 512))
def test_spans_take_their_rate_of_tokens(denoiser, length):
    for seed in range(20):
        spans = draw_spans(length, denoiser, random.Random(seed))
        assert sum(end - start for start, end in spans) == min(max(round(length * denoiser.rate), 1), length - 1)
        edges = [0, *(edge for span in spans for edge in span)]
        assert all(a < b for a, b in pairwise(edges)) and edges[-1] <= length
        if denoiser.span and length == 512:
            assert len(spans) == pytest.approx(512 * denoiser.rate / denoiser.span, abs=1)


def restore_text(example, vocabulary):
    """Replace every sentinel of the input by its span in the target."""
    spans, current = {}, None
    for token in example["labels"][: -len(vocabulary.eos)]:
        if token in vocabulary.sentinels:
            current = spans.setdefault(token, [])
        else:
            current.append(token)
    ids = []
    for token in example["input_ids"][: -len(vocabulary.eos)]:
        ids += spans.get(token, [token] if token < 900 else [])
    return ids


@pytest.mark.parametrize("objective", ("ul2", "d_ul2", "o_ul2"))
def test_every_token_is_in_the_input_or_the_target(objective):
    windows = [[(7 * i + j) % 800 + 10 for j in range(64)] for i in range(100)]
    examples = list(denoise(windows, objective, MODAL, seed=3))
    restored = Counter(token for example in examples for token in restore_text(example, MODAL))
    assert restored == Counter(token for window in windows for token in window)
    if objective != "o_ul2":
        assert [restore_text(e, MODAL) for e in examples] == windows
        assert {e["input_ids"][0] for e in examples} == {901, 902, 903}
    assert list(denoise(windows, objective, MODAL, seed=3)) == examples
    assert list(denoise(windows, objective, MODAL, seed=4)) != examples


def target_shares(objective):
    """Return the share of target tokens that each family gives."""
    windows = [[5] * 256] * 3000
    tokens = Counter()
    for example in denoise(windows, objective, MODAL, seed=0):
        tokens[{901: "R", 902: "S", 903: "X"}[example["input_ids"][0]]] += example["labels"].count(5)
    return {family: count / sum(tokens.values()) for family, count in tokens.items()}


def test_d_ul2_gives_every_family_the_same_share_of_targets():
    assert sum(mixing_rates("ul2").values()) == pytest.approx(1) == sum(mixing_rates("d_ul2").values())
    plain, balanced = target_shares("ul2"), target_shares("d_ul2")
    weights = {"R": 0.3, "S": 0.25, "X": 1.65}
    assert plain == pytest.approx({f: w / sum(weights.values()) for f, w in weights.items()}, abs=0.03)
    assert balanced == pytest.approx({"R": 1 / 3, "S": 1 / 3, "X": 1 / 3}, abs=0.04)


def padding_share(examples, batch=8):
    """Return the share of encoder and decoder positions that are padding in batches."""
    used = positions = 0
    for i in range(0, len(examples) - batch + 1, batch):
        part = examples[i : i + batch]
        for key in ("input_ids", "labels"):
            used += sum(len(e[key]) for e in part)
            positions += batch * max(len(e[key]) for e in part)
    return 1 - used / positions


def test_o_ul2_leaves_little_padding():
    windows = [[5] * 256] * 600
    plain, packed = (list(denoise(windows, o, PLAIN, seed=0)) for o in ("ul2", "o_ul2"))
    assert padding_share(packed) < 0.1 < 0.25 < padding_share(plain)
    assert max(len(e["input_ids"]) for e in packed) <= 257 and max(len(e["labels"]) for e in packed) <= 129


def test_special_tokens_are_found_in_the_tokenizer():
    words = {token: i for i, token in enumerate(["<unk>", "</s>", "a", "<extra_id_1>", "<extra_id_0>", "[S2S]"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="<unk>")
    assert Vocabulary.of(tokenizer) == Vocabulary((4, 3), (1,), {"R": (), "S": (5,), "X": ()})
    words = {token: i for i, token in enumerate(["<unk>", "</s>"])}
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")))
    with pytest.raises(lp.PrunerError, match="no sentinel tokens"):
        Vocabulary.of(bare)
