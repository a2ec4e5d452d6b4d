"""Measure candidates of a search: the distance of a refitted model's predictions from the original's."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from ..graph.units import CouplingGraph
from ..models.blockwise import computing, native_compute, standing_in
from ..models.inputs import Inputs
from ..models.running import equal_draws, evaluating, forward, main_output
from ..models.tasks import has_token_logits
from ..selection.plan import PruningPlan
from ..surgery.equivalence import masking_modes
from ..surgery.slicing import mask
from .distill import relative_distance
from .ladder import Ladder, Widths

SAMPLES_PER_PASS = 4


class Candidates:
    """The distance of candidates from the original on a few samples, without building any.

    A candidate is the unpruned model with zeros in the places of what it lacks, and with refitted projections of a
    ladder. The distance is KL(p || q) per token, with the original's probabilities p and the candidate's q; of models
    that predict no tokens, the squared distance of the main output, relative to the original's.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        shorter: PreTrainedModel,
        graph: CouplingGraph,
        ladder: Ladder,
        samples: Inputs,
    ):
        """Run the original on the samples.

        Args:
            model: original model.
            shorter: model whose widths are searched, as of :func:`~llm_pruner.refit.ladder.build_ladder`.
        """
        self.shorter, self.graph, self.ladder = shorter, graph, ladder
        self.compute = native_compute(shorter)
        self.batches = list(samples.to(self.compute.device).split(SAMPLES_PER_PASS))
        self.predicts = has_token_logits(model)
        with torch.no_grad(), evaluating(model), computing(model):
            self.outputs = [self._expected(model, batch) for batch in self.batches]

    def _expected(self, model: PreTrainedModel, batch: Inputs) -> torch.Tensor:
        """Return the original's probabilities of a batch, in 16 bits, or its main output."""
        with equal_draws():
            output = main_output(forward(model, batch))
        return output.float().softmax(-1).bfloat16() if self.predicts else output

    @torch.no_grad()
    def distance(self, widths: Widths, plan: PruningPlan, share: float = 1.0) -> float:
        """Return the mean distance over the first share of the batches.

        Args:
            widths: kept count by unit, of all units of the search.
            plan: plan that leaves these widths.
        """
        tensors = self.ladder.tensors(self.shorter, widths)
        modes = masking_modes(self.graph, plan)

        def stand_in(name: str, tensor: torch.Tensor) -> torch.Tensor:
            if name in tensors:
                return tensors[name]
            tensor = self.compute.convert(tensor)
            return modes.routers.stand_in(name, mask(name, tensor, plan) if name in plan.kept else tensor)

        total, positions = 0.0, 0
        count = max(1, round(share * len(self.batches)))
        with evaluating(self.shorter), modes.routing(self.shorter), standing_in(self.shorter, stand_in):
            for batch, expected in zip(self.batches[:count], self.outputs[:count], strict=True):
                with equal_draws():
                    output = main_output(forward(self.shorter, batch))
                total += self._compare(expected, output)
                positions += expected[..., 0].numel()
        return total / positions

    def _compare(self, expected: torch.Tensor, output: torch.Tensor) -> float:
        """Sum the distances of a batch, one sample at a time."""
        if not self.predicts:
            return relative_distance(expected, output).item()
        total = 0.0
        for p, ours in zip(expected, output, strict=True):
            log_q, p = ours.float().log_softmax(-1), p.float()
            total += torch.where(p > 0, p * (p.log() - log_q), 0).sum().item()
        return total
