"""Record of a run's refit, which lets ``llm-pruner apply --refit`` repeat it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..choices import TRAINED
from ..errors import PrunerError
from ..refit.compensate import METHODS
from .settings import CalibrationSettings


@dataclass(frozen=True, kw_only=True)
class RefitRecord:
    """Refit of a run, as ``plan.settings["refit"]`` records it.

    Attributes:
        calibration: calibration set.
        compensation: method, or ``none``.
        training: ``blocks``, ``distill`` or ``lora``, behind the compensation, or ``none``.
        training_samples: samples of the text that it read, those of the calibration set among them.
        training_tokens: its budget of tokens; under a budget of minutes, the tokens that it trained on.
        self_samples: samples that the model writes itself, in front of the others.
        seed: seed of these.
        narrow: multiply matrices in bfloat16 where the device is faster at that.
        rescale_norms: rescale norms before the compensation.
    """

    calibration: CalibrationSettings
    compensation: str = "none"
    training: str = "none"
    training_samples: int = 0
    training_tokens: int = 0
    self_samples: int = 0
    seed: int = 0
    narrow: bool = False
    rescale_norms: bool = False

    @property
    def does_anything(self) -> bool:
        """True if the run changed weights after the plan was applied."""
        return self.rescale_norms or self.compensation != "none" or self.training != "none"

    @property
    def names_methods(self) -> bool:
        """True if the methods exist."""
        return self.compensation in (*METHODS, "none") and self.training in (*TRAINED, "none")

    @classmethod
    def of(cls, record: Any) -> RefitRecord:
        """Read the record in a plan's settings.

        Raises:
            PrunerError: the record is missing or damaged.
        """
        if record is None:
            raise PrunerError("the plan's run was not refitted: leave out --refit")
        try:
            calibration = CalibrationSettings(**{"bos": False, **record["calibration"]})  # older records lack it
            refit = cls(**{**record, "calibration": calibration})
            numbers = [refit.self_samples, refit.seed, refit.training_samples, refit.training_tokens]
            numbers += [calibration.samples, calibration.tokens]
        except (TypeError, KeyError) as error:
            raise PrunerError(f"the plan's record of its refit is damaged: {error}") from error
        if not all(type(n) is int for n in numbers) or not refit.names_methods:
            raise PrunerError(f"the plan's record of its refit is damaged: {record}")
        return refit
