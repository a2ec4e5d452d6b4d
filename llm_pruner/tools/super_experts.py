"""List the super experts of a mixture, for ``llm-pruner inspect``."""

from __future__ import annotations

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data import calibration
from ..errors import PrunerError
from ..graph.units import CouplingGraph
from ..importance.super_experts import find_super_experts
from ..models.running import context_length
from .tables import print_table, print_text

SAMPLES, TOKENS = 32, 128  # of the text


def find_on_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, graph: CouplingGraph, name: str
) -> dict[str, list[int]]:
    """Return the super experts by the name of their unit, found on a text.

    Raises:
        PrunerError: the model has no tokenizer or no experts, or the text cannot be read.
    """
    if tokenizer is None:
        raise PrunerError(f"--super_experts {name} is a text, and the model has no tokenizer: leave it out")
    tokens = min(TOKENS, context_length(model) or TOKENS)
    return find_super_experts(model, graph, calibration(name, tokenizer, SAMPLES, tokens, fewer=True))


def print_super_experts(console: Console, found: dict[str, list[int]], name: str | None) -> None:
    """Print the super experts, or that the model has none."""
    if not found:
        print_text(console, f"no super experts on {name}: no expert writes massive activations")
        return
    cells = [["unit", "super experts"], *([unit, ", ".join(map(str, experts))] for unit, experts in found.items())]
    print_table(console, f"super experts on {name}", cells, texts=(1,))
