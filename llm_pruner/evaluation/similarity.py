"""Compare the outputs of two models that do not predict the next token; no labels are needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import PrunerError
from ..models.blockwise import Compute, computing
from ..models.running import context_length, evaluating, forward, main_output
from ..models.tasks import FEATURES, task_name
from ..progress import track

PIECE = 400  # characters
PIECES = 256  # most pieces of a text, where no number is given


@dataclass(frozen=True, kw_only=True)
class Similarity:
    """Similarity of a model's outputs to the original's on pieces of a text.

    Attributes:
        cosine: of the last hidden states averaged over a piece's tokens, the mean over pieces; None for a model with a
            head.
        agreement: share of the original's predictions (classes, tokens, or ends of an answer) that the model makes too,
            and of pairs of scores in the same order for a model that gives one score; None for a model without a head.
        pieces: pieces that both models read in the same number of tokens, if that matters to the comparison.
    """

    cosine: float | None
    agreement: float | None
    pieces: int


def pieces_of(text: str, most: int | None = None) -> list[str]:
    """Cut a text into its paragraphs, those into pieces of at most 400 characters, and return the first of them.

    >>> pieces_of("One. Two.\\n\\nThree.")
    ['One. Two.', 'Three.']

    Raises:
        PrunerError: the text is empty.
    """
    paragraphs = [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]
    pieces = [p[i : i + PIECE] for p in paragraphs if p for i in range(0, len(p), PIECE)]
    if not pieces:
        raise PrunerError("the text is empty: give one to compare outputs on")
    return pieces[: most or PIECES]


@torch.no_grad()
def outputs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pieces: list[str],
    *,
    compute: Compute | None = None,
    text_name: str = "the text",
) -> list[torch.Tensor]:
    """Return of every piece what :func:`similarity` compares; each is read with the tokenizer's special tokens.

    Returns:
        Of a model without a head, the mean of its last hidden states ``[hidden]``; of one that gives a single number,
        that ``[1]``; of others the predictions, a LongTensor ``[]``, ``[tokens]`` or ``[2]``.

    Raises:
        PrunerError: an output is not finite.
    """
    longest = min(context_length(model) or 512, 512)
    found = []
    with evaluating(model), computing(model, compute) as used:
        for piece in track(pieces, f"outputs on {text_name}"):
            ids = tokenizer(piece, truncation=True, max_length=longest, return_tensors="pt")["input_ids"]
            output = main_output(forward(model, ids.to(used.device)))[0].float().cpu()
            if not bool(output.isfinite().all()):
                raise PrunerError(f"the outputs of {model.name_or_path or type(model).__name__} are not finite")
            found.append(_comparable(model, output))
    return found


def _comparable(model: PreTrainedModel, output: torch.Tensor) -> torch.Tensor:
    task = task_name(model)
    if task == FEATURES:
        return output.mean(dim=0)
    if output.shape == (1,):
        return output
    return output.argmax(dim=0 if task == "question-answering" else -1)


def similarity(expected: list[torch.Tensor], found: list[torch.Tensor]) -> Similarity:
    """Compare the :func:`outputs` of a model with those of the original.

    >>> original = [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])]
    >>> similarity(original, [3 * output for output in original])
    Similarity(cosine=1.0, agreement=None, pieces=2)
    >>> similarity([torch.tensor([3, 1]), torch.tensor([0])], [torch.tensor([3, 2]), torch.tensor([0, 5])])
    Similarity(cosine=None, agreement=0.5, pieces=1)
    """
    pairs = [(one, other) for one, other in zip(expected, found, strict=True) if one.shape == other.shape]
    cosine = agreement = None
    if pairs and pairs[0][0].is_floating_point() and pairs[0][0].shape != (1,):
        cosine = sum(torch.cosine_similarity(*pair, dim=0).item() for pair in pairs) / len(pairs)
    elif pairs and pairs[0][0].is_floating_point():
        agreement = _share_of_pairs(*(torch.cat(scores) for scores in zip(*pairs, strict=True)))
    elif pairs:
        alike = [(one == other).double().flatten() for one, other in pairs]
        agreement = torch.cat(alike).mean().item()
    return Similarity(cosine=cosine, agreement=agreement, pieces=len(pairs))


class Originals:
    """Outputs of the first model that is measured on each text, with which those of later models are compared."""

    def __init__(self) -> None:
        self._outputs: dict[str, list[torch.Tensor]] = {}

    def compare(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        texts: Mapping[str, list[str]],
        *,
        compute: Compute | None = None,
    ) -> dict[str, Similarity]:
        """Return the similarity of a model on each text; keep its outputs, and return none, where it is the first.

        Args:
            texts: pieces of every text, by its name.
        """
        results = {}
        for name, pieces in texts.items():
            found = outputs(model, tokenizer, pieces, compute=compute, text_name=name)
            if name in self._outputs:
                results[name] = similarity(self._outputs[name], found)
            else:
                self._outputs[name] = found
        return results


def _share_of_pairs(expected: torch.Tensor, found: torch.Tensor) -> float | None:
    """Return the share of pairs of scores that are in the same order, None for a single score."""
    first, second = torch.triu_indices(len(expected), len(expected), offset=1)
    if not len(first):
        return None
    orders = [(scores[first] - scores[second]).sign() for scores in (expected, found)]
    return (orders[0] == orders[1]).double().mean().item()
