"""Compare the outputs of two models that do not predict the next token; no labels are needed."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..choices import SYNTHETIC
from ..errors import PrunerError
from ..logs import log
from ..media import is_media, media_inputs
from ..models.blockwise import Compute, computing
from ..models.inputs import Inputs, ModelInputs
from ..models.running import context_length, evaluating, forward, main_output
from ..models.tasks import FEATURES, OF_VALUES, task_name
from ..progress import track

PIECE = 400  # characters
LONGEST = 512  # tokens of a piece
MEDIA = 32  # most images or sounds that outputs are compared on
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
    tokenizer: PreTrainedTokenizerBase | None,
    pieces: list[str] | ModelInputs,
    *,
    compute: Compute | None = None,
    text_name: str = "the text",
) -> list[torch.Tensor]:
    """Return the output for each piece that :func:`similarity` compares; text is read with the special tokens.

    Returns:
        Of a model without a head, the mean of its last hidden states ``[hidden]`` or its embeddings; of one that gives
        pixels or depths, these; of one that gives a single number, that ``[1]``; of a classifier that may give several
        classes, a BoolTensor ``[classes]``; of others the predictions, a LongTensor ``[]``, ``[tokens]`` or ``[2]``.

    Raises:
        PrunerError: an output is not finite.
    """
    compared = []
    with evaluating(model), computing(model, compute) as used:
        for inputs in track(_samples_of(model, tokenizer, pieces), f"outputs on {text_name}"):
            output = main_output(forward(model, inputs.to(used.device)))[0].float().cpu()
            if not bool(output.isfinite().all()):
                raise PrunerError(f"the outputs of {model.name_or_path or type(model).__name__} are not finite")
            compared.append(_comparable(model, output))
    return compared


def _samples_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, pieces: list[str] | ModelInputs
) -> list[Inputs]:
    """Return the inputs of each piece: token ids ``[1, tokens]``, or a sample by name."""
    if isinstance(pieces, ModelInputs):
        return [*pieces.split(1)]
    assert tokenizer is not None
    return [token_ids(model, tokenizer, piece) for piece in pieces]


def token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, piece: str) -> torch.Tensor:
    """Return the ids of a piece ``[1, tokens]``, with special tokens, cut to what the model reads and to 512 tokens."""
    return _encode(model, tokenizer, piece)["input_ids"]


def text_inputs(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *texts: str) -> Inputs:
    """Return the :func:`token_ids` of a text; of two, the ids of both in one and, where the model reads it, which of
    them each token is of."""
    if len(texts) == 1:
        return token_ids(model, tokenizer, *texts)
    names = {"input_ids", "token_type_ids"} & inspect.signature(model.forward).parameters.keys()
    return ModelInputs({name: ids for name, ids in _encode(model, tokenizer, *texts).items() if name in names})


def _encode(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *texts: str) -> dict[str, torch.Tensor]:
    longest = min(context_length(model) or LONGEST, LONGEST)
    return dict(tokenizer(*texts, truncation=True, max_length=longest, return_tensors="pt"))


def gives_several_classes(model: PreTrainedModel) -> bool:
    """Return True for a classifier that may give several classes to one input: those whose logits are positive."""
    return getattr(model.config, "problem_type", None) == "multi_label_classification"


def _comparable(model: PreTrainedModel, output: torch.Tensor) -> torch.Tensor:
    task = task_name(model)
    if task == FEATURES and output.ndim == 2:
        return output.mean(dim=0)
    if task in (FEATURES, *OF_VALUES):
        return output.flatten()
    if output.shape == (1,):
        return output
    if gives_several_classes(model):
        return output > 0
    return output.argmax(dim=0 if task in ("question-answering", "image-segmentation") else -1)


def similarity(expected: list[torch.Tensor], actual: list[torch.Tensor]) -> Similarity:
    """Compare the :func:`outputs` of a model with those of the original.

    >>> original = [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])]
    >>> similarity(original, [3 * output for output in original])
    Similarity(cosine=1.0, agreement=None, pieces=2)
    >>> similarity([torch.tensor([3, 1]), torch.tensor([0])], [torch.tensor([3, 2]), torch.tensor([0, 5])])
    Similarity(cosine=None, agreement=0.5, pieces=1)
    """
    pairs = [(one, other) for one, other in zip(expected, actual, strict=True) if one.shape == other.shape]
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
        self._media: dict[str, ModelInputs] = {}

    def media(
        self, names: Iterable[str], model: PreTrainedModel, most: int | None = None, fallback: str = SYNTHETIC
    ) -> dict[str, ModelInputs]:
        """Return the inputs on which the outputs of models of images or sounds are compared, by data set.

        The first model's processor reads them, and all models are given the same. Texts, which such a model cannot do
        with alone, give way to ``fallback``.
        """
        names = list(names)
        chosen = [name for name in names if is_media(name)]
        if names and not chosen:
            chosen = [fallback]
            log.info("outputs are compared on %s: %s reads more than text", fallback, type(model).__name__)
        for name in chosen:
            if name not in self._media:
                self._media[name] = media_inputs(model, name, "test", min(most or MEDIA, MEDIA))
        return {name: self._media[name] for name in chosen}

    def compare(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        texts: Mapping[str, list[str] | ModelInputs],
        *,
        compute: Compute | None = None,
    ) -> dict[str, Similarity]:
        """Return the similarity of a model on each text; keep its outputs, and return none, where it is the first.

        Args:
            texts: pieces of every text, or inputs by name, by the name of the data set.
        """
        results = {}
        for name, pieces in texts.items():
            actual = outputs(model, tokenizer, pieces, compute=compute, text_name=name)
            if name in self._outputs:
                results[name] = similarity(self._outputs[name], actual)
            else:
                self._outputs[name] = actual
        return results


def _share_of_pairs(expected: torch.Tensor, actual: torch.Tensor) -> float | None:
    """Return the share of pairs of scores that are in the same order, None for a single score."""
    first, second = torch.triu_indices(len(expected), len(expected), offset=1)
    if not len(first):
        return None
    orders = [(scores[first] - scores[second]).sign() for scores in (expected, actual)]
    return (orders[0] == orders[1]).double().mean().item()
