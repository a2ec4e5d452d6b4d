"""A teacher that reads a text in its own tokens, where the student's cut tokenizer splits words into more.

A cut vocabulary leaves the weights as they were: reading the student's tokens, the original predicts what the cut model
predicts, and teaches it nothing. It knows more of the text in its own tokens. Where both splits of a text have a
boundary, its next token t is for the student the first of the tokens that t is split into:

    p'(s) = sum of p(t) over the tokens t whose split begins with s

Inside a word that only the student splits, the original has no prediction: p' is the student's label alone.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..errors import PrunerError

ALIGNED = ("teacher_input_ids", "teacher_attention_mask", "teacher_positions")  # columns of a batch
IMPOSSIBLE = -1e4  # logit of a token that does not follow, finite also in 16 bits


class OriginalSplit:
    """The split of texts by the original's tokenizer beside that by a cut one.

    Args:
        size: rows of the cut vocabulary.

    Attributes:
        named: LongTensor ``[n]``, ids of the original's tokens.
        first: LongTensor ``[n]``, for each the cut tokenizer's id of the first token that it is split into.

    Raises:
        PrunerError: the cut tokenizer has tokens that the original's lacks.
    """

    def __init__(self, original: PreTrainedTokenizerBase, cut: PreTrainedTokenizerBase, size: int):
        self._original, self._cut, self.size = original, cut, size
        self._ids, kept = original.get_vocab(), cut.get_vocab()
        self._names, self._kept_names = ({i: name for name, i in ids.items()} for ids in (self._ids, kept))
        if missing := kept.keys() - self._ids:
            raise PrunerError(
                f"--teacher has a tokenizer without {len(missing)} of the model's tokens, such as {min(missing)!r}: "
                "give the model that was cut"
            )
        model = cut.backend_tokenizer.model  # type: ignore[attr-defined]
        first = {i: kept[n] if n in kept else next((p.id for p in model.tokenize(n)), -1) for n, i in self._ids.items()}
        self.named = torch.tensor([i for i, piece in first.items() if piece >= 0])
        self.first = torch.tensor([piece for piece in first.values() if piece >= 0])

    def align(self, ids: list[int]) -> tuple[list[int], list[int]]:
        """Return the original's tokens of a text, and the position among them of each of the student's tokens.

        A position is -1 where the original's token ends later. A text that the original's tokenizer does not give
        back, such as one that begins inside a character, stays split as it is.

        Args:
            ids: the cut tokenizer's tokens of the text.
        """
        names = [self._kept_names[i] for i in ids]
        text = self._cut.decode(ids, clean_up_tokenization_spaces=False)
        theirs = list(self._original(text, add_special_tokens=False, verbose=False)["input_ids"])
        their_names = [self._names[i] for i in theirs]
        if "".join(names) != "".join(their_names):
            return [self._ids[name] for name in names], list(range(len(ids)))
        ends = {end: position for position, end in enumerate(accumulate(map(len, their_names)))}
        return theirs, [ends.get(end, -1) for end in accumulate(map(len, names))]

    def columns(self, rows: list[list[int]], length: int) -> dict[str, torch.Tensor]:
        """Return the columns :data:`ALIGNED` of a batch.

        Args:
            rows: the student's tokens, without padding.
            length: tokens of a row in the batch, with padding.
        """
        aligned = [self.align(row) for row in rows]
        longest = max(len(ids) for ids, _ in aligned)
        ids = torch.tensor([row + [0] * (longest - len(row)) for row, _ in aligned])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row, _ in aligned])
        positions = torch.tensor([row + [-1] * (length - len(row)) for _, row in aligned])
        return dict(zip(ALIGNED, (ids, mask, positions), strict=True))

    def logits(self, theirs: torch.Tensor, inputs: dict[str, Any], labels: torch.Tensor) -> torch.Tensor:
        """Return log-probabilities ``[rows, tokens, its vocabulary]`` of the student's tokens at its positions.

        Args:
            theirs: the original's logits ``[rows, its tokens, its vocabulary]``.
            inputs: batch with the columns :data:`ALIGNED`.
            labels: the student's, at the logits that predict them.
        """
        positions = inputs[ALIGNED[2]].to(theirs.device)
        p = at_positions(theirs, positions).float().softmax(-1)[..., self.named.to(theirs.device)]
        summed = p.new_zeros(*p.shape[:-1], self.size).index_add_(-1, self.first.to(theirs.device), p)
        certain = torch.full_like(summed[..., :1], IMPOSSIBLE).expand_as(summed)
        certain = certain.scatter(-1, labels.to(theirs.device).clamp_min(0)[..., None], 0.0)
        return summed.clamp_min(1e-30).log().where((positions >= 0)[..., None], certain)


def at_positions(values: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Return the values ``[rows, tokens, n]`` of positions ``[rows, m]``; those of position -1 have no meaning."""
    return values.gather(1, positions.clamp_min(0)[..., None].expand(-1, -1, values.shape[-1]))
