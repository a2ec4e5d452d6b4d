"""Scores: the importance of every index of every unit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes

from ..display import Cells, html_table, plot_shares
from ..errors import PrunerError
from ..files import write_bytes
from ..graph.places import Part, by_layer, kind_in, layer_in
from ..graph.units import Unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Safetensors inside, by a name that no loader of checkpoints takes for weights.
SCORES_FILE = "importance.scores"
Salience = Mapping[tuple[str, int], torch.Tensor]  # (parameter, dim) -> [size of the dim]
Dims = dict[str, list[int]]  # the dims of each parameter that need numbers per channel


@dataclass(repr=False)
class Scores:
    """Importance of every index of every unit: higher stays longer.

    Attributes:
        values: float64 tensor ``[unit.size]`` by unit name. Infinity marks an index that must stay, minus infinity one
            that is already removed. Where the choice depends on how many indices go (the best block of layers), the
            tensor is ``[unit.size - 1, unit.size]``, with row n - 1 for n of them.
        settings: criterion, aggregation and seed that gave the scores.

    Scores need not come from :func:`llm_pruner.score`:

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
        """Return the scores ``[unit.size]`` that decide which ``removed`` indices of a unit are removed.

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
        # Units may share a tensor, which safetensors refuse.
        values = {n: value.clone(memory_format=torch.contiguous_format) for n, value in self.values.items()}
        write_bytes(Path(path), to_bytes(values, {"settings": json.dumps(self.settings)}))

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        """Read scores that :meth:`save` wrote.

        Raises:
            PrunerError: the file is missing or holds no scores.
        """
        try:
            with safe_open(str(path), "pt") as file:
                settings, names = json.loads(file.metadata()["settings"]), file.keys()
                return cls({name: file.get_tensor(name) for name in names}, settings)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise PrunerError(f"cannot read the scores {path}: {error}") from error

    def table(self) -> Cells:
        """Return a table of the finite scores with a row per kind; the first row is the head."""
        finite: dict[str, list[torch.Tensor]] = {}
        for name, value in self.values.items():
            first = _for_one_removed(value)
            finite.setdefault(kind_in(name), []).append(first[torch.isfinite(first)])
        cells = [["kind", "units", "indices", "lowest score", "median", "highest"]]
        for kind, values in finite.items():
            scores = torch.cat(values)
            numbers = [scores.min(), scores.median(), scores.max()] if len(scores) else []
            shown = [f"{number.item():.4g}" for number in numbers] or ["-"] * 3
            cells.append([kind, f"{len(values):,}", f"{len(scores):,}", *shown])
        return cells

    def title(self) -> str:
        """Return the first line of the representations."""
        names = ("criterion", "taylor", "aggregation")
        return (
            f"Scores by {', '.join(str(self.settings[n]) for n in names if n in self.settings) or 'unknown criterion'}"
        )

    def __repr__(self) -> str:
        kinds = ", ".join(f"{indices} {kind} in {units} units" for kind, units, indices, *_ in self.table()[1:])
        return f"{self.title()}: {kinds or 'none'}"

    def _repr_html_(self) -> str:
        return html_table(self.title(), self.table())

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw each layer's share of the summed score of each kind of unit.

        Raises:
            PrunerError: there are no scores, or matplotlib is not installed.
        """
        sums = by_layer(part for name, value in self.values.items() for part in _score_parts(name, value))
        totals = {kind: sum(row.values()) or 1.0 for kind, row in sums.items()}
        shares = {kind: {layer: s / totals[kind] for layer, s in row.items()} for kind, row in sums.items()}
        return plot_shares(shares, title=self.title(), label="share of the score", ax=ax)


def _for_one_removed(value: torch.Tensor) -> torch.Tensor:
    """Return the scores ``[unit.size]`` by which one index would be chosen."""
    return value if value.ndim == 1 else value[0]


def _score_parts(name: str, value: torch.Tensor) -> list[Part]:
    """Return the summed finite scores of a unit; of whole layers, layer by layer."""
    scores = torch.where(torch.isfinite(value), value, 0.0)
    if kind_in(name) == "layers":
        return [(name, layer, score) for layer, score in enumerate(_for_one_removed(scores).tolist())]
    return [(name, layer_in(name), scores.sum().item())]


def save_salience(salience: Salience, path: Path, dims: Dims) -> None:
    """Write numbers per channel as safetensors, atomically.

    Args:
        dims: dims that were to be scored; a criterion may have no numbers for some of them.
    """
    tensors = {f"{name}|{dim}": t.contiguous() for (name, dim), t in salience.items()}
    write_bytes(path, to_bytes(tensors, {"dims": json.dumps(dims)}))


def load_salience(path: Path, dims: Dims) -> Salience | None:
    """Read numbers that :func:`save_salience` wrote; return None without a readable file that is about all ``dims``."""
    try:
        with safe_open(str(path), "pt") as file:
            scored = json.loads((file.metadata() or {}).get("dims", "{}"))
            if not all({*chosen} <= {*scored.get(name, ())} for name, chosen in dims.items()):
                return None
            tensors = {key.rpartition("|"): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError):
        return None
    return {(name, int(dim)): tensor for (name, _, dim), tensor in tensors.items()}
