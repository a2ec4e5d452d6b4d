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
Dims = dict[str, list[int]]  # the dims of each parameter that need numbers per channel


@dataclass
class Scores:
    """Importance of every index of every unit: higher stays longer.

    Attributes:
        values: float64 tensor ``[unit.size]`` by unit name. Infinity marks an index that must stay, minus infinity one
            that is already removed. Where the choice depends on how many indices go (the best block of layers), the
            tensor is ``[unit.size - 1, unit.size]``, with row n - 1 for n of them.
        settings: criterion, aggregation and seed that gave the scores.

    Scores from elsewhere are as good as those of :func:`llm_pruner.score`:

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> import llm_pruner as lp
    >>> config = LlamaConfig(
    ...     vocab_size=64, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=4
    ... )
    >>> graph = lp.trace(LlamaForCausalLM(config))
    >>> scores = lp.Scores({"model.layers.0.mlp.neurons": torch.tensor([5.0, 1, 7, 3, 6, 2, 8, 4]).double()})
    >>> plan = lp.select(graph, scores, ratio=0.5, kinds=["neurons"])
    >>> plan.units["model.layers.0.mlp.neurons"].kept.tolist()
    [0, 2, 4, 6]
    """

    values: dict[str, torch.Tensor]
    settings: dict[str, Any] = field(default_factory=dict)

    def of(self, unit: Unit, removed: int = 1) -> torch.Tensor:
        """Return the scores ``[unit.size]`` by which ``removed`` indices of a unit are chosen.

        Raises:
            PrunerError: the unit has no scores, or scores of another size, or one of them is NaN.
        """
        value = self.values.get(unit.name)
        if value is None or value.shape[-1] != unit.size:
            raise PrunerError(
                f"there are no scores [{unit.size}] for {unit.name}: score this model, with kinds=('{unit.kind}', ...)"
            )
        if torch.isnan(value).any():
            raise PrunerError(f"the scores of {unit.name} are not numbers (nan): score again, in another dtype")
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
    """Write numbers per channel as safetensors, atomically."""
    write_bytes(path, to_bytes({f"{name}|{dim}": t.contiguous() for (name, dim), t in salience.items()}))


def load_salience(path: Path) -> Salience | None:
    """Read what :func:`save_salience` wrote; return None without a readable file."""
    try:
        with safe_open(str(path), "pt") as file:
            tensors = {key.rpartition("|"): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None
    return {(name, int(dim)): tensor for (name, _, dim), tensor in tensors.items()}
