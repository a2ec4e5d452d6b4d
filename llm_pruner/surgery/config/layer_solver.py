"""Search the fields that give one layer, or one block of it, the shapes that a plan leaves.

The search of :mod:`llm_pruner.surgery.config.solver` for a single layer: candidates are fields whose value is a
multiple of a unit's size; they are tried on the meta device by the layer's own constructor.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations, islice, product
from math import prod
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.initialization import no_init_weights

from ...errors import PrunerError
from ...graph.places import common_path
from ...models.constructors import config_of, fields_of, numbers_of
from ...models.layers import is_below
from ...models.per_layer import Overrides, global_config, rebuild
from ...models.skeleton import Shapes, shapes_of

Recipe = dict[str, Any]  # an entry of submodule_overrides: "values", "shapes" and, of some, "attributes" or "absent"
# Numbers that are no width or count of a unit; one that happens to equal a width must not follow it.
NO_WIDTH = re.compile("vocab|token|per_tok|position|window|context|length|top_?k|layer(s|$)|buckets|seed|iters|epoch")
# Where as many heads as a head has channels are cut, shapes do not tell the count from the width; names do.
HEADS = re.compile("head(?!.*(dim|size))")
MAX_FIELDS, MAX_CANDIDATES, MAX_RECIPES = 4, 16, 6


@dataclass
class Solution:
    """Config values that give one layer its shapes.

    ``pins`` are derived values written down (the same for all layers), ``fields`` what changes in its config,
    ``blocks`` the recipes of the blocks in it that no config of the layer expresses.
    """

    pins: Overrides = field(default_factory=dict)
    fields: Overrides = field(default_factory=dict)
    blocks: dict[str, Recipe] = field(default_factory=dict)


@dataclass
class Cut:
    """Reduction of one unit for the solver: ``size`` indices become ``kept``, along these dims of a layer.

    Attributes:
        inner: True if the cut lies in this layer alone.
        counts: values of fields that count the unit: its size, and for key-value heads the number of query heads.
        heads: True if the indices are heads.
    """

    size: int
    kept: int
    dims: set[tuple[str, int]]
    inner: bool
    counts: set[int]
    heads: bool = False


class LayerSolver:
    """A solver of one layer after the other: equal problems are solved once, further solutions only on demand."""

    def __init__(self) -> None:
        self.found: dict[Any, tuple[list[Solution], Iterator[Solution]]] = {}

    def solve(self, layer: nn.Module, wanted: Shapes, cuts: list[Cut], attempt: int) -> Solution:
        """Return the ``attempt``-th solution of a layer, or its last."""
        config = config_of(layer)
        config = config and global_config(config)
        now = shapes_of(layer)
        if now == wanted:
            return Solution()
        key = (type(layer), tuple(sorted(now.items())), tuple(sorted(wanted.items())))
        known, more = self.found.setdefault(key, ([], _solutions(layer, config, now, wanted, cuts)))
        while len(known) <= attempt and (solution := next(more, None)) is not None:
            known.append(solution)
        if known:
            return known[min(attempt, len(known) - 1)]
        name = next(n for n in wanted if now[n] != wanted[n])
        raise PrunerError(
            f"no {type(config).__name__ if config else 'argument'} makes {name} of {type(layer).__name__} "
            f"{list(wanted[name])} instead of {list(now[name])}"
        )

    def progressed(self, attempt: int) -> bool:
        """Return True if the last attempt gave any layer another solution."""
        return any(len(known) > attempt for known, _ in self.found.values())


def _solutions(
    layer: nn.Module, config: PreTrainedConfig | None, now: Shapes, wanted: Shapes, cuts: list[Cut]
) -> Iterator[Solution]:
    """Yield solutions that need no block of its own first, then those with one, two, ..."""
    owners = sorted({path for cut in cuts for path in _owners(layer, cut)})
    for count in range(len(owners) + 1):
        for special in combinations(owners, count):
            options = [list(islice(_block_recipes(layer, path, wanted, cuts), MAX_RECIPES)) for path in special]
            rest = {n: s for n, s in wanted.items() if not any(is_below(path, n) for path in special)}
            if not all(options):
                continue
            for pins, fields in _field_solutions(layer, config, {n: now[n] for n in rest}, rest, cuts):
                old = _restate_fields(layer, config, special, pins, fields)
                if old is None:
                    continue
                for blocks in product(*options):
                    recipes = [
                        {**block, "values": old[path] | block["values"]}
                        for path, block in zip(special, blocks, strict=True)
                    ]
                    yield Solution(pins, fields, dict(zip(special, recipes, strict=True)))


def _restate_fields(
    layer: nn.Module, config: PreTrainedConfig | None, blocks: tuple[str, ...], pins: Overrides, fields: Overrides
) -> dict[str, Overrides] | None:
    """Return the old values that each block needs again, since it sees the layer's changed config and numbers.

    None if the changed layer has no such block.
    """
    if not fields:
        return {path: {} for path in blocks}
    changed = _try(layer, pins | fields)
    assert changed is not None and config is not None
    old = {field: fields_of(config)[field] for field in fields}
    restated = {}
    blocks_by_path = dict(changed.named_modules())
    for path in blocks:
        if path not in blocks_by_path:
            return None
        now = numbers_of(blocks_by_path[path])
        restated[path] = old | {n: v for n, v in numbers_of(layer.get_submodule(path)).items() if now.get(n) != v}
    return restated


def _numbers(module: nn.Module) -> list[tuple[str, str, Any]]:
    """Return every number that the modules hold: head counts, split sizes, scales."""
    return [
        (path, key, value)
        for path, m in module.named_modules()
        for key, value in vars(m).items()
        if isinstance(value, (int, float)) and key != "training"
    ]


def _owners(layer: nn.Module, cut: Cut) -> list[str]:
    """Return the blocks of a layer that may have to be built on their own, because a cut goes through them.

    For an inner cut, the smallest block that holds all of it; for one that runs through the whole model, every
    child that it touches. Only blocks that are built from a config or from numbers count; the layer itself only
    where it is given numbers.
    """

    def counts(block: nn.Module) -> bool:
        return bool(config_of(block) or numbers_of(block))

    if not cut.inner:
        children = dict(_children(layer))
        touched = [path for path in children if any(is_below(path, name) for name, _ in cut.dims)]
        return [path for path in touched if counts(children[path])]
    path = common_path(name for name, _ in cut.dims)
    while path and not counts(layer.get_submodule(path)):
        path = path.rpartition(".")[0]
    return [path] if path or numbers_of(layer) else []


def _children(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the blocks of a layer, with those in its lists."""
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList):
            yield from _children(child, f"{path}{name}.")
        else:
            yield f"{path}{name}", child


def candidates(fields: Mapping[str, Any], cuts: list[Cut]) -> dict[tuple[str, int], bool]:
    """Return fields that may carry a cut with their new values, and True for fields that count the unit itself.

    Fields that count the unit come first.
    """
    ratios = sorted((c.size, c.kept) for c in cuts)
    counts = {count for c in cuts for count in c.counts}
    # Two at once, for a field that counts groups times members.
    subsets = list(dict.fromkeys(s for n in (1, 2) for s in combinations(ratios, n)))
    values: dict[tuple[str, int], bool] = {}
    for name, value in fields.items():
        if isinstance(value, bool) or NO_WIDTH.search(name):
            continue
        if value is None:
            values.update({(name, kept): False for _, kept in ratios})
        elif isinstance(value, int) and value > 1:
            for subset in subsets:
                size, kept = prod(s for s, _ in subset), prod(k for _, k in subset)
                if value % size == 0 and size != kept:
                    values[name, value // size * kept] = value in counts
    heads = any(c.heads for c in cuts)
    return dict(sorted(values.items(), key=lambda item: (not item[1], heads and not HEADS.search(item[0][0]))))


def _pins(layer: nn.Module, config: PreTrainedConfig, now: Shapes, cut_dims: set[tuple[str, int]]) -> Overrides:
    """Return the derived head size to write down, so that it stays when head count or hidden size change.

    The result is empty unless the architecture reads such a field and the cut touches dims that depend on it.
    """
    heads, hidden = getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", None)
    if not isinstance(heads, int) or not isinstance(hidden, int) or getattr(config, "head_dim", None) is not None:
        return {}
    other = _try(layer, {"head_dim": 2 * (hidden // heads)})
    dependent = {name for name, _ in _changed(now, shapes_of(other))} if other is not None else set()
    return {"head_dim": hidden // heads} if dependent & {name for name, _ in cut_dims} else {}


def _try(module: nn.Module, values: Overrides) -> nn.Module | None:
    try:
        with torch.device("meta"), no_init_weights():
            return rebuild(module, values)
    except Exception:  # a constructor may refuse a config in any way it likes
        return None


def _field_solutions(
    layer: nn.Module, config: PreTrainedConfig | None, now: Shapes, wanted: Shapes, cuts: list[Cut]
) -> Iterator[tuple[Overrides, Overrides]]:
    """Yield ``(pins, fields)`` that turn exactly the shapes ``now`` into ``wanted``, the fewest fields first."""
    if now == wanted:
        yield {}, {}
        return
    if config is None:
        return

    def fits(values: Overrides) -> bool:
        built = _try(layer, values)
        return built is not None and not _changed(wanted, shapes_of(built))

    cut_dims = _changed(now, wanted)
    pins = _pins(layer, config, now, cut_dims)
    allowed: dict[tuple[str, int], bool] = {}
    everything = candidates(fields_of(config), cuts)
    for (name, value), counts in everything.items():
        built = _try(layer, {**pins, name: value})
        changed = cut_dims if built is None else _changed(now, shapes_of(built))
        # A value that is refused alone may make sense together with another.
        if changed and changed <= cut_dims:
            allowed[name, value] = counts
    counting = [item for item, counts in everything.items() if counts]
    for fields in _subsets(allowed):
        built = _try(layer, pins | fields)
        if built is not None and not _changed(wanted, shapes_of(built)):
            yield pins, fields
            if extra := _shapeless_counts(layer, built, pins | fields, counting, cuts):
                yield pins, fields | extra
    for fields in _compensating_fields(fields_of(config), [cut for cut in cuts if not cut.inner]):
        if fits(pins | fields) and not fits(pins | dict(list(fields.items())[:1])):
            yield pins, fields


def _shapeless_counts(
    layer: nn.Module, built: nn.Module, fields: Overrides, counting: list[tuple[str, int]], cuts: list[Cut]
) -> Overrides:
    """Return counts of the unit that no shape shows, such as the key-value heads of latent attention.

    They must matter to the blocks that are cut, and to no others: a layer may hold the same number for another reason.
    """
    blocks = tuple(path for cut in cuts if cut.inner for path in _owners(layer, cut))
    shapes, numbers = shapes_of(built), set(_numbers(built))
    counts: Overrides = {}
    for name, value in counting:
        other = _try(layer, fields | {name: value}) if name not in fields else None
        if other is not None and shapes_of(other) == shapes:
            moved = {path for path, _, _ in set(_numbers(other)) ^ numbers}
            if moved and all(path.startswith(blocks) for path in moved):
                counts[name] = value
    return counts


def _compensating_fields(fields: Mapping[str, Any], cuts: list[Cut]) -> Iterator[Overrides]:
    """Yield a field that shrinks with another that grows: an inner size stated as a multiple of the hidden size."""
    widths = [item for item, counting in candidates(fields, cuts).items() if counting]
    numbers = [(name, f) for name, f in fields.items() if isinstance(f, int) and not isinstance(f, bool)]
    factors = [(name, f) for name, f in numbers if f > 0 and not NO_WIDTH.search(name)]
    for (name, value), cut, (other, factor) in product(widths, cuts, factors):
        if other != name and factor * cut.size % cut.kept == 0:
            yield {name: value, other: factor * cut.size // cut.kept}


def _changed(before: Shapes, after: Shapes) -> set[tuple[str, int]]:
    """Return the dims in which ``after`` differs, over the names of ``before``; a name lost or reshaped differs in
    dim -1."""
    differences = set()
    for name, shape in before.items():
        other = after.get(name, ())
        if len(other) != len(shape):
            differences.add((name, -1))
        differences |= {(name, d) for d, (a, b) in enumerate(zip(shape, other, strict=False)) if a != b}
    return differences


def _subsets(items: dict[tuple[str, int], bool], most_counting: bool = False) -> Iterator[Overrides]:
    """Yield sets of up to four fields: those with the fewest fields that do not count the units first, then small ones.

    With ``most_counting``, sets with more counting fields come first instead.
    """
    pool = list(items)[:MAX_CANDIDATES]
    subsets = [
        subset
        for count in range(1, MAX_FIELDS + 1)
        for subset in combinations(pool, count)
        if len({name for name, _ in subset}) == count
    ]

    def order(subset: tuple[tuple[str, int], ...]) -> tuple[int, int]:
        others = sum(not items[item] for item in subset)
        return others, -len(subset) if most_counting else len(subset)

    for subset in sorted(subsets, key=order):
        yield dict(subset)


def _block_recipes(layer: nn.Module, path: str, wanted: Shapes, cuts: list[Cut]) -> Iterator[Recipe]:
    """Yield recipes for one block as if the model were narrower: inner dims from its config, the others as stated.

    As many fields that count the unit are changed as the shapes allow: a head count shows in no shape where the
    width is derived from the hidden size.
    """
    block = layer.get_submodule(path)
    fields = fields_of(config_of(block)) | numbers_of(block)
    prefix = f"{path}." if path else ""
    target = {n.removeprefix(prefix): s for n, s in wanted.items() if is_below(path, n)}
    mine = [c for c in cuts if all(is_below(path, n) for n, _ in c.dims)]
    inner = {(n.removeprefix(prefix), d) for c in mine for n, d in c.dims if is_below(path, n)}

    def fits(values: Overrides) -> bool:
        built = _try(block, values)
        shapes = {} if built is None else shapes_of(built)
        return shapes.keys() == target.keys() and all(shapes[n][d] == target[n][d] for n, d in inner)

    before, numbers = shapes_of(block), _numbers(block)
    matters = {}
    for (name, value), counts in candidates(fields, mine).items():
        built = _try(block, {name: value})
        # What shows in no shape is changed only if it counts the unit: T5's largest distance does not.
        if built is None or shapes_of(built) != before or (counts and _numbers(built) != numbers):
            matters[name, value] = counts
    shapes = {n: list(s) for n, s in target.items()}
    for values in _subsets(matters, most_counting=True):
        if fits(values):
            yield {"values": values, "shapes": shapes}
    # Last, the shapes alone: enough for an MLP whose width nothing but its weights knows. Whether it is enough is
    # for the trace of the result to say.
    yield {"values": {}, "shapes": shapes}
