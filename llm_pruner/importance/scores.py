"""Scores: the importance of every index of every unit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes

from ..errors import PrunerError
from ..files import write_bytes
from ..graph.units import Unit

# Safetensors inside, by a name that no loader of checkpoints takes for weights.
SCORES_FILE = "importance.scores"
Salience = Mapping[tuple[str, int], torch.Tensor]  # (parameter, dim) -> [size of the dim]
Dims = dict[str, list[int]]  # the dims of each parameter that a number is wanted for


@dataclass
class Scores:
    """What each index of each unit is worth: ``values[unit.name]`` is a float64 tensor ``[unit.size]``.

    Where that depends on how many indices go, as with the best block of layers, it is ``[unit.size - 1, unit.size]``:
    row n - 1 is for n of them. Infinite are those that must stay, minus infinite those that are gone already.
    """

    values: dict[str, torch.Tensor]
    settings: dict[str, Any] = field(default_factory=dict)

    def of(self, unit: Unit, removed: int = 1) -> torch.Tensor:
        """The scores ``[unit.size]`` by which ``removed`` indices of a unit are chosen.

        Raises:
            PrunerError: there are none, they are for a unit of another size, or no numbers.
        """
        value = self.values.get(unit.name)
        if value is None or value.shape[-1] != unit.size:
            raise PrunerError(
                f"there are no scores [{unit.size}] for {unit.name}: score this model, with kinds=('{unit.kind}', ...)"
            )
        if torch.isnan(value).any():
            raise PrunerError(f"the scores of {unit.name} are no numbers (nan): score again, in another dtype")
        return value if value.ndim == 1 else value[max(removed, 1) - 1]

    def save(self, path: str | Path) -> None:
        """Write the scores as safetensors, the settings in its header."""
        values = {name: value.contiguous() for name, value in self.values.items()}
        write_bytes(Path(path), to_bytes(values, {"settings": json.dumps(self.settings)}))

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        """Read what :meth:`save` wrote.

        Raises:
            PrunerError: the file is missing or holds something else.
        """
        try:
            with safe_open(str(path), "pt") as file:
                settings, names = json.loads(file.metadata()["settings"]), file.keys()
                return cls({name: file.get_tensor(name) for name in names}, settings)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise PrunerError(f"cannot read the scores {path}: {error}") from error


def save_salience(salience: Salience, path: Path) -> None:
    """Keep numbers per channel, as safetensors; the file is there whole or not at all."""
    write_bytes(path, to_bytes({f"{name}|{dim}": t.contiguous() for (name, dim), t in salience.items()}))


def load_salience(path: Path) -> Salience | None:
    """What :func:`save_salience` wrote, None where there is nothing."""
    try:
        with safe_open(str(path), "pt") as file:
            found = {key.rpartition("|"): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None
    return {(name, int(dim)): tensor for (name, _, dim), tensor in found.items()}
