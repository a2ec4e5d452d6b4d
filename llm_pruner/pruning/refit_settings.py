"""Settings of the refit of a pruning run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..choices import CLOSED_FORM, TRAINED
from ..errors import PrunerError
from ..refit.budget import Budget
from .arguments import PruneArguments


@dataclass(frozen=True, kw_only=True)
class RefitSettings:
    """Settings of the refit after pruning.

    Attributes:
        compensation: method of the closed form, or ``none``.
        training: ``blocks``, ``distill`` or ``lora``, behind the closed form, or ``none``.
        budget: budget of the training.
        required: fail if the refit is impossible, instead of going on without it; of a training, its closed form is
            not required.
        self_samples: calibration samples that the model writes itself, besides those of the text.
        self_samples_required: write them even if the model is offloaded, which is slow; fail if it cannot write.
        rescale_norms: rescale norms when hidden channels are removed.
    """

    compensation: str = "none"
    training: str = "none"
    budget: Budget | None = None
    required: bool = False
    self_samples: int = 0
    self_samples_required: bool = False
    rescale_norms: bool = False

    @property
    def needs_text(self) -> bool:
        """True if the refit reads a calibration set."""
        return self.compensation != "none" or self.training != "none"


def refit_settings(arguments: PruneArguments, value: Mapping[str, Any]) -> RefitSettings:
    """Return the settings of the refit.

    Args:
        value: flags by name, filled from the preset.

    Raises:
        PrunerError: both names of the refit are given, hidden channels are pruned and the refit compares them, or a
            budget has no training.
    """
    if (
        arguments.compensate is not None and arguments.refit is not None
    ):  # "none" too, which counts as no flag elsewhere
        raise PrunerError("--compensate and --refit exclude each other (each names the refit): give one")
    refit = value["refit"]
    required = arguments.refit is not None or arguments.compensate is not None
    closed_form = CLOSED_FORM["ridge"] if refit in TRAINED else CLOSED_FORM.get(refit, "none")
    if "hidden" in (*arguments.kinds, *("hidden",) * arguments.channel_wise):
        if required and refit in CLOSED_FORM:
            raise PrunerError(
                f"--refit {refit} compares hidden states of one size, and hidden channels are pruned: give --refit "
                "lora, distill or blocks"
            )
        closed_form = "none"
    given = (arguments.refit_tokens, arguments.refit_minutes)
    if given != (None, None) and refit not in TRAINED:
        name = "refit_minutes" if arguments.refit_tokens is None else "refit_tokens"
        raise PrunerError(f"--{name} has no effect with --refit {refit}: give --refit lora, distill or blocks")
    tokens = value["refit_tokens"] if arguments.refit_minutes is None else arguments.refit_tokens
    return RefitSettings(
        compensation=closed_form,
        training=refit if refit in TRAINED else "none",
        budget=Budget(tokens=tokens, minutes=arguments.refit_minutes) if refit in TRAINED else None,
        required=required,
        self_samples=value["self_examples"],
        self_samples_required=arguments.self_examples is not None,
        rescale_norms=arguments.rescale_norms,
    )
