"""From numbers per channel of a weight to one score per index of a unit (LLM-Pruner, section 3.2).

A *slice* is one weight dim that a unit runs through: the rows of ``q_proj``, the columns of ``down_proj``.
Each slice gives one number per channel; the numbers of the slices are aggregated channel by channel, and
the channels of one index (the head_dim channels of a head) are summed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes

from ..errors import PrunerError
from ..files import write_bytes
from ..graph import Unit

# Safetensors inside, by a name that no loader of checkpoints takes for weights.
SCORES_FILE = "importance.scores"

Salience = Mapping[tuple[str, int], torch.Tensor]  # (parameter, dim) -> [size of the dim]
Dims = dict[str, list[int]]  # the dims of each parameter that a number is wanted for

# ``first`` is the root of the group (q_proj, gate_proj, or one projection that holds both), ``last`` what it ends in.
AGGREGATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sum": lambda slices: slices.sum(0),
    "mean": lambda slices: slices.mean(0),
    "max": lambda slices: slices.amax(0),
    "prod": lambda slices: slices.prod(0),
    "first": lambda slices: slices[0],
    "last": lambda slices: slices[-1],
}


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


def scored_slices(unit: Unit, ranks: Mapping[str, int]) -> list[tuple[str, int]]:
    """The slices that count: all but the biases of weights that count already, as in LLM-Pruner."""
    dims = [(name, dim) for name, dim in unit.dims if name in ranks]  # buffers have no gradient
    owners = {name.rpartition(".")[0] for name, _ in dims if ranks[name] > 1}
    return [(name, dim) for name, dim in dims if ranks[name] > 1 or name.rpartition(".")[0] not in owners]


def slices_of(units: Iterable[Unit], ranks: Mapping[str, int]) -> Dims:
    """The dims of every parameter that some unit needs a number for."""
    out: dict[str, list[int]] = {}
    for unit in units:
        for name, dim in scored_slices(unit, ranks):
            if dim not in out.setdefault(name, []):
                out[name].append(dim)
    return out


def aggregate(unit: Unit, salience: Salience, ranks: Mapping[str, int], aggregation: str) -> torch.Tensor:
    """Scores ``[unit.size]`` from the per-channel numbers of the unit's slices, of those that have some.

    Where slices have different widths (a key-value group has more query than key channels), the query heads
    of a group are summed onto it, channel by channel.
    """
    known = [key for key in scored_slices(unit, ranks) if key in salience]
    if unit.kind == "layers":  # every slice belongs to one index: there is nothing to aggregate over
        out = torch.zeros(unit.size, dtype=torch.float64)
        for key in known:
            out.index_add_(0, unit.dims[key], salience[key].double())
        return out
    slices = [salience[key].double()[unit.positions(*key)] for key in known]
    width = min(s.shape[1] for s in slices)
    if any(s.shape[1] % width for s in slices):
        width = 1
    folded = torch.stack([s.view(unit.size, -1, width).sum(1) for s in slices])
    return AGGREGATIONS[aggregation](folded).sum(-1)


def reduce_to(dim: int, value: torch.Tensor) -> torch.Tensor:
    """Sum a weight-shaped tensor over all dims but one: ``[size of that dim]``."""
    others = [d for d in range(value.ndim) if d != dim]
    return value.sum(others) if others else value
