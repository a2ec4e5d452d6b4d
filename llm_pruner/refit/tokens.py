"""Tokens of a cut vocabulary in the original's, so that both models can read one text and be compared on it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..models.inputs import IDS, Inputs, ModelInputs


@dataclass(frozen=True)
class KeptTokens:
    """Kept tokens of a cut vocabulary.

    Every kept token is one of the original's, so the original can read a text as the cut tokenizer splits it. Its
    probabilities of the kept tokens alone, scaled to a sum of 1, are what the pruned model can learn.

    Attributes:
        kept: LongTensor ``[tokens]``, the original's id of every token.

    >>> tokens = KeptTokens(torch.tensor([0, 2, 5]))
    >>> tokens.original_ids(torch.tensor([[2, 1]])), tokens.kept_logits(torch.arange(6))
    (tensor([[5, 2]]), tensor([0, 2, 5]))
    """

    kept: torch.Tensor

    def original_ids(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the original's ids of tokens."""
        return self.kept.to(ids.device)[ids]

    def original_inputs(self, inputs: Inputs) -> Inputs:
        """Return inputs of the pruned model as inputs of the original."""
        if isinstance(inputs, torch.Tensor):
            return self.original_ids(inputs)
        return ModelInputs(*(self.original_tensors(part) for part in inputs.parts))

    def original_tensors(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the arguments of the pruned model's forward pass as arguments of the original's."""
        return {name: self.original_ids(value) if name in IDS else value for name, value in tensors.items()}

    def kept_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the original's logits ``[..., tokens]`` of the kept tokens."""
        return logits[..., self.kept.to(logits.device)]
