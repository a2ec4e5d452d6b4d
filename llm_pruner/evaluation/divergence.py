"""Measure how far the next-token distributions of a model are from the original's: KL divergence per token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.nn.functional import kl_div
from transformers import PreTrainedModel

from ..models.blockwise import computing
from ..models.running import evaluating, model_inputs
from ..progress import track

TOKENS = 2048  # to compare on; their error is a few percent
BYTES = 2**29  # most that the original's distributions take
LEAST = -6e4  # log-probability; float16 holds no less


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """Divergence of a model from the original on a text.

    Attributes:
        kl: mean of KL(original ‖ model) over the predicted tokens, in nats.
        error: its standard error over the windows; None for a single window.
        tokens: number of predicted tokens.
    """

    kl: float
    error: float | None
    tokens: int


def windows_compared(vocabulary: int, seq_len: int) -> int:
    """Return the number of windows to compare on, so that the original's distributions stay small.

    >>> windows_compared(49152, 128), windows_compared(262144, 128)
    (16, 8)
    """
    return max(1, min(TOKENS, BYTES // (2 * vocabulary)) // seq_len)


class OriginalDistributions:
    """Distributions of the first model that is measured on each text, with which later models are compared."""

    def __init__(self) -> None:
        self._texts: dict[str, tuple[torch.Tensor, list[torch.Tensor]]] = {}  # windows and their distributions
        self._tokenizer = ""

    def compare(
        self, model: PreTrainedModel, texts: Mapping[str, torch.Tensor], tokenizer: str
    ) -> dict[str, Divergence]:
        """Return the divergence of a model on each text; keep its distributions, and return none, if it is the first.

        A model with another vocabulary, or whose tokenizer splits a text otherwise, has no divergence.

        Args:
            texts: windows ``[windows, seq_len]`` by name; the first of them are compared.
            tokenizer: hash of the vocabulary.
        """
        first = not self._texts
        if first:
            self._tokenizer = tokenizer
        if tokenizer != self._tokenizer:
            return {}
        results: dict[str, Divergence] = {}
        for name, ids in texts.items():
            if first:
                self._texts[name] = ids, self._distributions(model, ids, name)
            elif name in self._texts and torch.equal(ids, self._texts[name][0]):
                divergence = _divergence(self._texts[name][1], self._distributions(model, ids, name))
                results |= {name: divergence} if divergence is not None else {}
        return results

    @staticmethod
    @torch.no_grad()
    def _distributions(model: PreTrainedModel, ids: torch.Tensor, name: str) -> list[torch.Tensor]:
        """Return the log-probabilities of each window ``[tokens, vocabulary]``, in float16 on the CPU."""
        rows: list[torch.Tensor] = []
        with evaluating(model), computing(model) as used:
            for row in track(ids[: max(1, TOKENS // ids.shape[1])].split(1), f"distributions on {name}"):
                logits = model(**model_inputs(model, row.to(used.device)), use_cache=False).logits[0, :-1]
                rows.append(logits.float().log_softmax(-1).clamp_min(LEAST).half().cpu())
                if len(rows) == windows_compared(logits.shape[-1], ids.shape[1]):
                    break
        return rows


def _divergence(original: list[torch.Tensor], other: list[torch.Tensor]) -> Divergence | None:
    """Return the divergence between distributions, None between those over different vocabularies."""
    if original[0].shape != other[0].shape:
        return None
    pairs = zip(original, other, strict=True)
    # Normalised again after rounding, so that no divergence is negative.
    windows = [
        kl_div(q.float().log_softmax(-1), p.float().log_softmax(-1), log_target=True, reduction="none").sum(-1).mean()
        for p, q in pairs
    ]
    means = torch.stack(windows)
    error = float(means.std() / len(means) ** 0.5) if len(means) > 1 else None
    return Divergence(kl=float(means.mean()), error=error, tokens=sum(len(p) for p in original))
