"""State shared by the steps of a pruning run: settings, calibration set, clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..checkpoint.blocks import Blocks
from ..checkpoint.locate import identity
from ..choices import UNGROUPED
from ..graph.units import CouplingGraph
from ..importance.score import score
from ..importance.scores import Scores
from ..models.arithmetic import narrow_arithmetic
from ..models.inputs import Inputs, hash_of
from ..peak_memory import give_back_memory
from ..progress import Step
from ..provenance import versions
from ..selection.plan import PruningPlan
from ..surgery.apply import Place, in_memory
from ..unfinished import NOTHING_KEPT, Unfinished
from .settings import PruneSettings

Weights = Iterable[tuple[str, torch.Tensor]]
Progress = Callable[[str, int, int], None]
# Stages that are one step, in words; the steps of other stages say themselves how far they are.
WHOLE_STAGES = {
    "trace": "tracing",
    "select": "selecting",
    "apply": "slicing weights",
    "verify": "comparing with the masked original",
    "latency": "timing both models",
    "generate": "generating samples",
}


class Stopwatch:
    """Seconds of each named stage; tells ``progress`` (stage, done, total) when a stage begins and ends."""

    def __init__(self, progress: Progress | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self.progress = progress

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        if self.progress:
            self.progress(stage, 0, 1)
        with Step(WHOLE_STAGES[stage]) if stage in WHOLE_STAGES else nullcontext():
            yield
        give_back_memory()
        if self.progress:
            self.progress(stage, 1, 1)
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + time.perf_counter() - start, 3)


@dataclass(frozen=True, kw_only=True)
class Planning:
    """Inputs of planning.

    Attributes:
        ids: calibration set, LongTensor ``[samples, tokens]`` or other inputs, None if the settings need none.
        leading: tokens that every row of ``ids`` begins with, see :func:`~.calibration.leading_count`.
        place: where tensors of pruned models are put.
        weights: weights to score one after the other, of a model on the meta device.
        blocks: positions that a quantized checkpoint stores together, none if they need not stay together.
    """

    settings: PruneSettings
    ids: Inputs | None = None
    leading: int = 0
    clock: Stopwatch = field(default_factory=Stopwatch)
    place: Place = in_memory
    weights: Weights | None = None
    blocks: Blocks = field(default_factory=dict)

    @cached_property
    def key(self) -> list[Any]:
        """Values of JSON on which the result of every step depends: model, arithmetic, calibration set, versions."""
        model, ids, experts = self.settings.model, self.ids, self.settings.experts
        return [
            *(versions(), identity(model.name), model.task, model.dtype, model.narrow, model.device, model.offload),
            *(None if ids is None else hash_of(ids), self.settings.calibration.towers, experts.per_token),
        ]

    def unfinished(
        self, step: str, *depends: Any, plan: PruningPlan | None = None, text: Inputs | None = None
    ) -> Unfinished:
        """Return the file of what a step has done so far.

        Args:
            depends: values of JSON on which its result depends, besides :attr:`key`, ``plan`` and ``text``.
        """
        folder = self.settings.output.unfinished
        if folder is None:
            return NOTHING_KEPT
        key = [*self.key, plan and plan.key, None if text is None else hash_of(text), *depends]
        return Unfinished(folder / f"{step}.safetensors", key)

    def arithmetic(self) -> AbstractContextManager[None]:
        """Return a context of passes over the calibration set, which may multiply matrices in bfloat16."""
        model = self.settings.model
        return narrow_arithmetic(torch.device(model.device)) if model.narrow else nullcontext()

    def score_widths(
        self, model: PreTrainedModel, graph: CouplingGraph, kinds: tuple[str, ...], cache: Path | None = None
    ) -> Scores:
        """Score the units of some kinds by the settings' criterion."""
        scoring = self.settings.scoring
        with self.clock("score"), self.arithmetic():
            return score(
                model,
                graph,
                self.ids,
                criterion=scoring.criterion,
                taylor=scoring.taylor,
                aggregation="sum" if scoring.aggregation == UNGROUPED else scoring.aggregation,  # over one weight
                kinds=kinds,
                seed=scoring.seed,
                device=self.settings.model.device,
                weights=self.weights,
                cache=cache,
                protect_super_experts="experts" in kinds and self.settings.experts.protects(scoring.criterion),
            )
