"""Input and output of criteria."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ..graph.units import Unit
from ..models.blockwise import Compute
from ..models.running import check_calibration
from ..unfinished import NOTHING_KEPT, Unfinished
from .scores import Dims
from .super_experts import ExpertPeaks


@dataclass(frozen=True, kw_only=True)
class Request:
    """Argument of a criterion: the model, the units to score and the calibration set.

    Attributes:
        model: model to score, in its own mode, dtype and device. A criterion must leave it unchanged.
        units: units to score: ``unit.name``, ``unit.kind``, ``unit.layer``, ``unit.size``, and ``unit.positions(name,
            dim)``, a LongTensor ``[unit.size, channels per index]``, for each ``(parameter name, dim)`` of
            ``unit.dims``.
        dims: ``{parameter name: [dim, ...]}``, the dims whose channels need numbers: dim 0 of ``gate_proj.weight``
            ``[out, in]`` has its rows, dim 1 its columns.
        calibration: token ids, LongTensor ``[samples, tokens]``, unchecked; None if the caller gave none.
        taylor: variant of ``taylor``, from ``--taylor``.
        seed: seed for random numbers, from ``--seed``.
        compute: device and dtype to compute with; ``compute.convert(tensor)`` brings a weight there.
        weights: pairs of a parameter name and its weight, to be read once, in this order; they may come from files
            while ``model`` is on the meta device.
        unfinished: keeps what a long criterion has done, for a run that goes on after a stop.
        peaks: what a criterion that watches experts shows their outputs to, to find super experts; None: nothing.
    """

    model: PreTrainedModel
    units: list[Unit]
    dims: Dims
    calibration: Any
    taylor: str = "param_first"
    seed: int = 0
    compute: Compute
    weights: Iterable[tuple[str, torch.Tensor]]
    peaks: ExpertPeaks | None = None
    unfinished: Unfinished = NOTHING_KEPT

    @property
    def tokens(self) -> Any:
        """Calibration set, checked: LongTensor ``[samples, tokens]`` of ids that the model can read.

        Raises:
            PrunerError: the calibration set is missing, or the model cannot read it.
        """
        return check_calibration(self.model, self.calibration)


# Numbers per channel {(parameter, dim): [size of the dim]}, or scores per unit {unit name: [unit size]}.
Result = Mapping[tuple[str, int], torch.Tensor] | Mapping[str, torch.Tensor]
Criterion = Callable[[Request], Result]
