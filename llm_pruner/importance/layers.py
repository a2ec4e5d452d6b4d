"""Criteria for whole layers, or for the attention or MLP of each layer, by forward passes or by position.

block_influence   1 - mean_t cos(h_t, h'_t), with h the hidden state of token t in front of a layer and h' that behind
                  (ShortGPT, arXiv 2403.03853, equation 1)
cosine            1 - mean_t cos(f_t, f'_t), with f the hidden state behind the last layer, f' that without the layer
loss_change       growth of the mean token loss when the layer passes its input on
                  (as in Shortened LLaMA, arXiv 2402.02834, section 3.1, with the loss for the perplexity)
loss              the same, measured anew after each removal: the cheapest layer goes first
contiguous        the block of n layers over which hidden states turn least: arccos(mean_t cos(h_t, h'_t)) / pi, with
                  h' the hidden state behind the block (Gromov et al., arXiv 2403.17887, equation 6, over all tokens)
last              the last layers go first (LLM-Pruner's ``--layer_wise``)
spaced_middle     n layers around the middle, as far apart as the stack allows (Pruning-LLMs, OpenBA-V2)

A model that does not predict the next token has no loss, and is scored by the others.
A layer that holds a tensor that no other layer has (T5's first holds the position bias of all) stays.

For a block, such as the attention of a layer, "without the layer" means that the block adds nothing to the layer, and
``block_influence`` takes h behind the layer without the block (He et al., arXiv 2406.15786, section 3.1, compare the
states around the block). ``contiguous`` is for whole layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import floor, pi
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cosine_similarity

from ..errors import PrunerError
from ..graph.units import Unit
from ..models.arithmetic import in_float64
from ..models.blockwise import Compute, computing
from ..models.hooks import forward_hooks
from ..models.inputs import Inputs, tokens_per_sample
from ..models.layers import hidden_out
from ..models.loss import has_loss
from ..models.per_layer import layer_lists
from ..models.running import evaluating, forward
from ..progress import track
from .layer_passes import CachedPass, LayerStack

TOKENS_PER_PASS = 2048  # in a forward pass


def _block_influence(stack: LayerStack) -> torch.Tensor:
    similarity, tokens = torch.zeros(len(stack.layers), dtype=torch.float64), 0
    for ids in track(stack.batches, "scoring layers"):
        pairs = _without_and_with(stack, ids)
        tokens += pairs[0][0][..., 0].numel()
        for i, (without, output) in enumerate(pairs):
            similarity[i] += cosine_similarity(in_float64(without), in_float64(output), dim=-1).sum().cpu()
    return stack.scores({i: (1 - similarity[i] / tokens).item() for i in stack.free})


def _without_and_with(stack: LayerStack, ids: Inputs) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return what leaves each layer without what is scored there, and what leaves it, in one pass of the model."""
    if not stack.blocks:
        return list(pairwise(CachedPass(stack, ids).states))
    order: list[int] = []
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []

    def compare(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        order.append(index := stack.layers.index(layer))
        without = hidden_out(output)
        if index not in stack.fixed:
            with stack.silenced(index):
                without = hidden_out(layer.forward(*args, **kwargs))
        pairs.append((without, hidden_out(output)))

    with forward_hooks([(layer, compare) for layer in stack.layers], with_kwargs=True):
        forward(stack.model, ids)
    stack.check_order(order)
    return pairs


def _cosine(stack: LayerStack) -> torch.Tensor:
    similarity, tokens = dict.fromkeys(stack.free, 0.0), 0
    for ids in track(stack.batches, "scoring layers"):
        cached = CachedPass(stack, ids)
        output = in_float64(cached.states[-1])
        tokens += output[..., 0].numel()
        for i in stack.free:
            with cached.without({i}, i) as states:
                forward(stack.model, ids)
            similarity[i] += cosine_similarity(in_float64(states[-1]), output, dim=-1).sum().item()
    return stack.scores({i: 1 - value / tokens for i, value in similarity.items()})


def _loss_change(stack: LayerStack) -> torch.Tensor:
    change, tokens = dict.fromkeys(stack.free, 0.0), 0
    for ids in track(stack.batches, "scoring layers"):
        cached = CachedPass(stack, ids)
        tokens += cached.tokens
        for i in stack.free:
            change[i] += cached.loss_without({i}, i) - cached.loss
    return stack.scores({i: value / tokens for i, value in change.items()})


def _greedy_loss(stack: LayerStack) -> torch.Tensor:
    """Remove the layer whose removal costs least, again and again; scores ascend in the order of removal."""
    removal = _GreedyRemoval(stack)
    ordered: list[tuple[int, float]] = []
    for _ in track(range(min(stack.most, len(removal.costs))), "choosing layers"):
        ordered.append(removal.remove_cheapest())
    # What stays costs more than what goes, whatever was measured when.
    ordered += sorted(removal.costs.items(), key=lambda pair: pair[1])
    scores, least = dict[int, float](), -torch.inf
    for index, cost in ordered:
        scores[index] = least = _above(least, cost)
    return stack.scores(scores)


class _GreedyRemoval:
    """Layers removed one by one, each measured without those already removed (lazy greedy selection).

    Mostly, a layer costs more as others go. So a removal measures only the layers that were cheapest when last
    measured, until one that was just measured is the cheapest.

    Attributes:
        costs: growth of the mean token loss by each layer that is still there, when last measured.
    """

    def __init__(self, stack: LayerStack):
        self.passes = [CachedPass(stack, ids) for ids in stack.batches]
        self.tokens = sum(cached.tokens for cached in self.passes)
        self.removed: set[int] = set()
        self.costs = {index: self._measure(index) for index in track(stack.free, "measuring the loss without layers")}

    def _measure(self, index: int) -> float:
        removed = self.removed | {index}
        return sum(cached.loss_without(removed, index) - cached.loss for cached in self.passes) / self.tokens

    def remove_cheapest(self) -> tuple[int, float]:
        """Remove the cheapest layer; return its index and cost."""
        current = set() if self.removed else set(self.costs)
        while (index := min(self.costs, key=lambda i: self.costs[i])) not in current:
            self.costs[index] = self._measure(index)
            current.add(index)
        self.removed.add(index)
        for cached in self.passes:
            cached.remove(self.removed, index)
        return index, self.costs.pop(index)


def _above(least: float, value: float) -> float:
    """Return the value, or the next number above ``least`` if it does not lie above."""
    return max(value, torch.nextafter(torch.tensor(least, dtype=torch.float64), torch.tensor(torch.inf)).item())


def _contiguous(stack: LayerStack) -> torch.Tensor:
    size = len(stack.layers)
    similarity, tokens = torch.zeros(size + 1, size + 1, dtype=torch.float64), 0
    for ids in track(stack.batches, "scoring layers"):
        states = [nn.functional.normalize(in_float64(s), dim=-1).flatten(0, -2) for s in CachedPass(stack, ids).states]
        tokens += len(states[0])
        for i, before in enumerate(states):
            for j in range(i + 1, size + 1):
                similarity[i, j] += (before * states[j]).sum().cpu()
    angle = (similarity / tokens).clamp(-1, 1).arccos() / pi

    def block(count: int) -> list[int]:
        starts = [s for s in range(size - count + 1) if not stack.fixed & set(range(s, s + count))]
        start = min(starts, key=lambda s: angle[s, s + count].item(), default=0)
        return list(range(start, start + count))

    return stack.by_count(block)


def _last(stack: LayerStack) -> torch.Tensor:
    return stack.scores({i: float(len(stack.layers) - i) for i in stack.free})


def _spaced_middle(stack: LayerStack) -> torch.Tensor:
    def spaced(count: int) -> list[int]:
        free = stack.free
        # Even steps, of at least two while the stack has room, so that no two layers are neighbours.
        step = max(len(free) / (count + 1), min(2.0, (len(free) - 1) / max(count - 1, 1)))
        first = (len(free) - 1) / 2 - (count - 1) / 2 * step
        return [free[min(floor(first + i * step + 0.5), len(free) - 1)] for i in range(min(count, len(free)))]

    return stack.by_count(spaced)


# By position, or by what forward passes say.
STRATEGIES: dict[str, Callable[[LayerStack], torch.Tensor]] = {
    "last": _last,
    "spaced_middle": _spaced_middle,
    "block_influence": _block_influence,
    "cosine": _cosine,
    "loss_change": _loss_change,
    "loss": _greedy_loss,
    "contiguous": _contiguous,
}
BY_POSITION = ("last", "spaced_middle")
BY_LOSS = ("loss_change", "loss")


@torch.no_grad()
def score_layers(
    model: nn.Module,
    unit: Unit,
    strategy: str,
    calibration: Inputs | None,
    *,
    compute: Compute,
    most: int | None = None,
    blocks: Sequence[nn.Module | None] = (),
) -> torch.Tensor:
    """Score each layer of a stack by a strategy: float64 ``[layers]``, infinite for layers that must stay.

    Where the choice depends on how many layers go, ``[layers - 1, layers]``: row n - 1 is for n.

    Args:
        unit: stack of layers, a unit of kind ``layers``.
        calibration: LongTensor ``[samples, tokens]``; None for a strategy of :data:`BY_POSITION`.
        most: largest number of layers that will go (default: any number); ``loss`` measures no further.
        blocks: block of each layer to score instead, None where a layer has none that can go.

    Raises:
        PrunerError: the strategy compares losses, and the model has none, or it is for whole layers.
    """
    check_strategy(model, strategy)
    if blocks and strategy == "contiguous":
        raise PrunerError(f"--depth {strategy} chooses whole layers that follow each other: give another for blocks")
    layers = list(layer_lists(model)[unit.name.removesuffix(".layers")])
    batches: Any = ()
    if strategy not in BY_POSITION:
        assert calibration is not None  # checked by the caller
        batches = calibration.to(compute.device).split(max(1, TOKENS_PER_PASS // tokens_per_sample(calibration)))
    most = len(layers) - 1 if most is None else most
    fixed = {i for i, block in enumerate(blocks) if block is None} if blocks else irreplaceable_layers(layers)
    stack = LayerStack(model, layers, list(blocks), fixed, batches, compute, most)
    if strategy in BY_POSITION:
        return STRATEGIES[strategy](stack)
    with evaluating(model), computing(model, compute):
        return STRATEGIES[strategy](stack)


def check_strategy(model: nn.Module, strategy: str) -> None:
    """Refuse strategies that compare losses for a model that has none.

    Raises:
        PrunerError: as above.
    """
    if strategy in BY_LOSS and not has_loss(model):
        others = ", ".join(name for name in STRATEGIES if name not in BY_LOSS)
        raise PrunerError(
            f"--depth {strategy}: {type(model).__name__} does not predict the next token of a text, so layers have no "
            f"loss to be chosen by: give {others}"
        )


def irreplaceable_layers(layers: list[nn.Module]) -> set[int]:
    """Return the layers that hold a tensor that no other layer of their stack has."""
    names = [{name for name, _ in layer.named_parameters()} for layer in layers]
    return {
        i for i, mine in enumerate(names) if mine - set().union(*(other for j, other in enumerate(names) if j != i))
    }
