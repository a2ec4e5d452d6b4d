"""Compare a model before and after its vocabulary was cut, on a text that was not counted."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import PrunerError
from ..evaluation.perplexity import byte_perplexity
from ..evaluation.similarity import outputs, pieces_of, similarity
from ..models.generate import generate
from ..models.running import context_length, evaluating, main_output
from ..models.tasks import has_token_logits, predicts_tokens
from ..progress import track
from .counting import whole_texts

PIECE = 200  # characters of a piece of text
PIECES = 5000  # most pieces to tokenize
COMPARED_PIECES, COMPARED_TOKENS, NEW_TOKENS = 32, 64, 16  # whose logits and continuations are compared
WINDOW = 128  # tokens


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Effects of cutting the vocabulary.

    Attributes:
        pieces: pieces of text that both tokenizers read.
        tokenized_otherwise: share of pieces whose tokens changed.
        fertility_before, fertility_after: tokens per word between blanks.
        compared: pieces with unchanged tokens whose outputs are compared: logits on kept tokens, classes, or hidden
            states.
        identical: of these, pieces with bitwise equal outputs.
        largest_difference: between two such outputs.
        generations: pieces after which the original generates only kept tokens.
        generations_equal: of these, pieces after which both models generate the same tokens.
        byte_perplexity_before, byte_perplexity_after: perplexity per byte of the text, which compares across
            tokenizers; see :attr:`llm_pruner.evaluation.perplexity.Perplexity.byte_perplexity`. None for a model that
            does not predict tokens.
        cosine, agreement: how alike the outputs of such a model are on pieces of the text, whatever their tokens; see
            :class:`llm_pruner.evaluation.similarity.Similarity`.
    """

    pieces: int
    tokenized_otherwise: float
    fertility_before: float
    fertility_after: float
    compared: int
    identical: int
    largest_difference: float
    generations_equal: int
    generations: int
    byte_perplexity_before: float | None = None
    byte_perplexity_after: float | None = None
    cosine: float | None = None
    agreement: float | None = None


def compare_vocabularies(
    original: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    pruned: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    kept: list[int],
    *,
    held_out: str,
    max_windows: int | None = None,
) -> Comparison:
    """Compare model and tokenizer before and after on a text.

    Args:
        kept: ids of the original that the pruned model keeps, in order.
        max_windows: measure perplexity only on the text of the original's first windows of 128 tokens, and similarity
            on so many pieces.

    Raises:
        PrunerError: the text is shorter than one window, or a loss is not finite.
    """
    pieces = [held_out[i : i + PIECE] for i in range(0, min(len(held_out), PIECES * PIECE), PIECE)]
    before, after = _tokenize(original[1], pieces), _tokenize(pruned[1], pieces)
    new_id = {old: position for position, old in enumerate(kept)}
    unchanged = [old for old, new in zip(before, after, strict=True) if [new_id.get(i) for i in old] == new]
    words = sum(len(piece.split()) for piece in pieces)
    return Comparison(
        pieces=len(pieces),
        tokenized_otherwise=1 - len(unchanged) / len(pieces),
        fertility_before=sum(map(len, before)) / words,
        fertility_after=sum(map(len, after)) / words,
        **_compare_models(original[0], pruned[0], new_id, unchanged),
        **_compare_quality(original, pruned, held_out, max_windows),
    )


def _compare_quality(
    original: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    pruned: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    held_out: str,
    max_windows: int | None,
) -> dict[str, Any]:
    """Return the perplexity per byte of both models, or how alike their outputs are if they do not predict tokens."""
    if predicts_tokens(original[0]):
        read = _beginning(*original, held_out, max_windows) if max_windows else held_out
        perplexities = {"before": original, "after": pruned}
        return {f"byte_perplexity_{when}": _byte_perplexity(*pair, read) for when, pair in perplexities.items()}
    pieces = pieces_of(held_out, max_windows)
    similar = similarity(*(outputs(*pair, pieces) for pair in (original, pruned)))
    return {"cosine": similar.cosine, "agreement": similar.agreement}


def _tokenize(tokenizer: PreTrainedTokenizerBase, pieces: list[str]) -> list[list[int]]:
    return [e.ids for e in whole_texts(tokenizer).encode_batch_fast(pieces, add_special_tokens=False)]


def _compare_models(
    model: PreTrainedModel, pruned: PreTrainedModel, new_id: dict[int, int], pieces: list[list[int]]
) -> dict[str, Any]:
    """Compare outputs and continuations on pieces whose tokens are all kept."""
    longest = min(COMPARED_TOKENS, (context_length(model) or 2**31) - NEW_TOKENS)
    rows = list(itertools.islice((ids[:longest] for ids in pieces if len(ids) > 1), COMPARED_PIECES))
    kept = torch.tensor(list(new_id), device=model.device) if has_token_logits(model) else slice(None)
    differences: list[float] = []
    generations = equal = 0
    for row in track(rows, "comparing logits and continuations"):
        ids = torch.tensor([row], device=model.device)
        new_ids = torch.tensor([[new_id[i] for i in row]], device=pruned.device)
        differences.append((_logits(model, ids)[..., kept] - _logits(pruned, new_ids)).abs().max().item())
        continuation = _continue(model, ids)
        if continuation and new_id.keys() >= set(continuation):
            generations += 1
            equal += [new_id[i] for i in continuation] == _continue(pruned, new_ids)
    return {
        "compared": len(rows),
        "identical": differences.count(0),
        "largest_difference": max(differences, default=0.0),
        "generations": generations,
        "generations_equal": equal,
    }


@torch.no_grad()
def _logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})
    with evaluating(model):
        return main_output(model(**inputs))


def _continue(model: PreTrainedModel, ids: torch.Tensor) -> list[int]:
    """Continue a row greedily; nothing for a model that cannot generate."""
    try:
        return cast(list[int], generate(model, ids, new_tokens=NEW_TOKENS)[0].tolist())
    except PrunerError:
        return []


def _window(model: PreTrainedModel) -> int:
    """Return the tokens per window for perplexity."""
    return min(WINDOW, context_length(model) or WINDOW)


def _byte_perplexity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> float:
    return byte_perplexity(model, tokenizer, text, _window(model))


def _beginning(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, held_out: str, max_windows: int) -> str:
    """Return the text of the original's first windows: both models then read the same text, each in its own tokens."""
    length = _window(model)
    ids = tokenizer(held_out, truncation=False, verbose=False)["input_ids"]
    end = max_windows * length + length // 2  # tokens at the cut may change and be a few fewer
    return str(tokenizer.decode(cast(list[int], ids)[:end], skip_special_tokens=True))
