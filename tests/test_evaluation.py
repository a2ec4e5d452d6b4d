"""Perplexity against a straight computation."""

import math

import pytest
import torch
from conftest import build, tokens
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from llm_pruner.errors import PrunerError
from llm_pruner.evaluation import perplexity, windows


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
