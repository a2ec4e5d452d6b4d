"""Finds the config whose model has exactly the shapes that a plan leaves.

No field is known by name. A field may be the one if its value is a multiple of a unit's size; it is one if
changing it changes, on the meta device, dims that the plan cuts and no others. Layers are solved one at a
time, each built by its own constructor; fields on which all layers agree are then lifted to the config
itself, and what is left becomes per-layer (:mod:`llm_pruner.surgery.heterogeneous`). Shapes can agree by
coincidence, so :func:`llm_pruner.apply` traces the result and compares units before it trusts it.
"""

from __future__ import annotations

import copy
import os.path
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, combinations, product
from math import prod
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from ..errors import PrunerError
from ..graph import CouplingGraph, sources
from ..selection import PruningPlan
from .heterogeneous import SUBMODULES, Overrides, global_config, rebuilt, record_constructors, stack_of, with_values
from .slicing import cut_shape, renamed

Shapes = dict[str, tuple[int, ...]]
Recipe = dict[str, Any]  # {"config": overrides, "shapes": {parameter: shape}}
MAX_FIELDS, MAX_CANDIDATES, MAX_ATTEMPTS = 4, 16, 6


@dataclass
class Solution:
    """How one layer gets its shapes.

    ``pins`` are derived values written down (the same for all layers), ``fields`` what changes in its config,
    ``blocks`` the recipes of the blocks in it that no config of the layer expresses.
    """

    pins: Overrides = field(default_factory=dict)
    fields: Overrides = field(default_factory=dict)
    blocks: dict[str, Recipe] = field(default_factory=dict)


@dataclass
class Cut:
    """One unit's loss as the solver sees it: ``size`` indices become ``kept``, along these dims of a layer.

    ``inner`` cuts lie in this layer alone. ``counts`` are the values that a field may well have that counts
    the unit: its size, and for key-value heads the number of query heads.
    """

    size: int
    kept: int
    dims: set[tuple[str, int]]
    inner: bool
    counts: set[int]


def skeleton(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """The model on the meta device, every module remembering how it was constructed."""
    record_constructors(model_class)
    with torch.device("meta"), no_init_weights():
        model = model_class(copy.deepcopy(config))
    model.tie_weights()
    return model


def solve(model: PreTrainedModel, plan: PruningPlan, graph: CouplingGraph) -> Iterator[PreTrainedConfig]:
    """Configs of the pruned model, the likeliest first. All give the right shapes; the caller picks one that also
    gives the right units.

    Args:
        model: the model to be pruned; only its class, config and shapes are read.
        graph: its units.

    Raises:
        PrunerError: no config expresses the shapes; the message names the first tensors that do not fit.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            record_constructors(type(module))
    targets = {
        new: cut_shape(name, tuple(tensor.shape), plan)
        for name, tensor in sources(model).items()
        if (new := renamed(name, plan)) is not None
    }
    config = copy.deepcopy(model.config)
    owner, prefix = _stack_owner(model)
    text = _same_config(config, model.config, owner.config) if owner is not None else config
    if plan.layers:
        _drop_layers(text, plan)
    for choice in plan.units.values():
        if choice.kind == "vocabulary":
            config.get_text_config().vocab_size = choice.kept.numel()
    if owner is None:
        yield _checked(model, [config], targets, plan)
        return

    base = skeleton(type(model), config)
    stack = base.get_submodule(prefix)
    solver = _LayerSolver()
    origin = plan.layers[prefix].tolist() if prefix in plan.layers else range(len(stack))  # type: ignore[arg-type]
    problem: PrunerError | None = None
    for attempt in range(MAX_ATTEMPTS):
        solutions = []
        for i, old in enumerate(origin):
            path = f"{prefix}.{i}."
            wanted = {n.removeprefix(path): s for n, s in targets.items() if n.startswith(path)}
            cuts = _cuts(plan, graph, f"{prefix}.{old}.")
            solutions.append(solver.solve(stack[i], _layer_config(text, i), wanted, cuts, attempt))  # type: ignore[index]
        if attempt and not solver.progressed(attempt):
            break
        variants = [_assemble(config, model.config, owner.config, solutions, lift) for lift in (True, False)]
        try:
            yield _checked(model, variants, targets, plan)
        except PrunerError as error:  # the next attempt may fit
            problem = problem or error
    if problem:
        raise problem


def _stack_owner(model: PreTrainedModel) -> tuple[PreTrainedModel | None, str]:
    """The (sub)model that owns the stack of layers, and the path of the stack."""
    for path, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            layers = getattr(module.config, "num_hidden_layers", None)
            stack = stack_of(module, layers) if layers else None
            for name, child in module.named_modules():
                if child is stack and stack is not None:
                    return module, f"{path}.{name}".lstrip(".")
    return None, ""


def _same_config(config: PreTrainedConfig, original: PreTrainedConfig, wanted: PreTrainedConfig) -> PreTrainedConfig:
    """The part of ``config`` that corresponds to ``wanted`` in ``original``."""
    for name, value in vars(original).items():
        if value is wanted:
            return getattr(config, name)
    return config


def _layer_config(config: PreTrainedConfig, index: int) -> PreTrainedConfig:
    return config.per_layer_config[index] if config.is_heterogeneous else config


def _drop_layers(config: PreTrainedConfig, plan: PruningPlan) -> None:
    """Shorten the stack, and every list that has an entry a layer."""
    if len(plan.layers) != 1 or config.is_heterogeneous or getattr(config, SUBMODULES, None):
        raise PrunerError("layers can be dropped from a model with one stack of equally configured layers only")
    (kept,) = plan.layers.values()
    before = config.num_hidden_layers
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == before:
            setattr(config, name, [value[i] for i in kept.tolist()])
    config.num_hidden_layers = kept.numel()


def _cuts(plan: PruningPlan, graph: CouplingGraph, path: str) -> list[Cut]:
    """The cuts that touch one layer, with parameter names relative to it."""
    units = {unit.name: unit for unit in [*graph.units, *graph.frozen]}
    groups = [u for u in units.values() if u.kind == "query_heads"]
    out = []
    for name, choice in plan.units.items():
        dims = set(units[name].dims)
        here = {(p.removeprefix(path), d) for p, d in dims if p.startswith(path)}
        if here and choice.kind != "layers":
            counts = {choice.size} | {choice.size * u.size for u in groups if dims & set(u.dims)}
            out.append(Cut(choice.size, choice.kept.numel(), here, len(here) == len(dims), counts))
    return out


def _assemble(
    config: PreTrainedConfig,
    original: PreTrainedConfig,
    owner: PreTrainedConfig,
    solutions: list[Solution],
    lift: bool,
) -> PreTrainedConfig:
    """One config out of every layer's; with ``lift``, what all layers share is set once."""
    config = copy.deepcopy(config)
    text = _same_config(config, original, owner)
    layers: dict[int, Overrides] = {}
    if text.is_heterogeneous:
        layers = {i: dict(o) for i, o in text._heterogeneity_spec.per_layer_overrides.items()}
        text.per_layer_config = None
    common = {field: value for s in solutions for field, value in s.pins.items()}
    if lift:
        first = solutions[0].fields
        common |= {f: v for f, v in first.items() if all(s.fields.get(f) == v for s in solutions)}
    for field, value in common.items():
        setattr(text, field, value)
    for i, solution in enumerate(solutions):
        own = layers.get(i, {}) | solution.fields
        layers[i] = {f: v for f, v in own.items() if f not in common}
    layers = {i: own for i, own in layers.items() if own}
    if layers:
        # Validators and caches read the global value of fields that layers override.
        text.allow_global_per_layer_attribute_access = True
        text.per_layer_config = layers
    known: dict[str, dict[str, Recipe]] = copy.deepcopy(getattr(text, SUBMODULES, None) or {})
    for i, solution in enumerate(solutions):
        for path, recipe in solution.blocks.items():
            before = known.setdefault(str(i), {}).get(path, {"config": {}})
            known[str(i)][path] = {"config": before["config"] | recipe["config"], "shapes": recipe["shapes"]}
    if known:
        setattr(text, SUBMODULES, known)
    return config


def _checked(
    model: PreTrainedModel, variants: list[PreTrainedConfig], targets: Shapes, plan: PruningPlan
) -> PreTrainedConfig:
    """The first config that builds exactly the target shapes, if need be with one more field changed.

    That one is for widths that the layers do not see, such as that of an embedding with a projection of its own.
    """
    cuts = [Cut(c.size, c.kept.numel(), set(), False, {c.size}) for c in plan.units.values() if c.layer is None]
    problem = ""
    for config in variants:
        extra = [dict([item]) for item, counts in _candidates(config, cuts).items() if counts]
        for fields in [{}, *extra]:
            tried = with_values(config, fields) if fields else config
            try:
                shapes = _shapes(skeleton(type(model), tried))
            except Exception as error:  # a constructor may refuse a config in any way it likes
                problem = problem or f"{type(error).__name__}: {error}"
                continue
            wrong = [n for n in targets.keys() | shapes.keys() if shapes.get(n) != targets.get(n)]
            if not wrong:
                return tried
            name = min(wrong)
            problem = problem or f"{name} would be {shapes.get(name)} instead of {targets.get(name)}"
    raise PrunerError(f"no config of {type(model.config).__name__} has the shapes that the plan leaves: {problem}")


class _LayerSolver:
    """Solves one layer after the other; equal problems are solved once, further solutions only on demand."""

    def __init__(self) -> None:
        self.found: dict[Any, tuple[list[Solution], Iterator[Solution]]] = {}

    def solve(
        self, layer: nn.Module, config: PreTrainedConfig, wanted: Shapes, cuts: list[Cut], attempt: int
    ) -> Solution:
        """The ``attempt``-th solution of a layer, or its last."""
        now = _shapes(layer)
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
            f"no config of {type(config).__name__} makes {name} of {type(layer).__name__} {list(wanted[name])} "
            f"instead of {list(now[name])}"
        )

    def progressed(self, attempt: int) -> bool:
        return any(len(known) > attempt for known, _ in self.found.values())


def _solutions(
    layer: nn.Module, config: PreTrainedConfig, now: Shapes, wanted: Shapes, cuts: list[Cut]
) -> Iterator[Solution]:
    """Solutions that need no block of its own first, then those with one, two, ..."""
    owners = sorted({path for cut in cuts for path in _owners(layer, cut)})
    for count in range(len(owners) + 1):
        for special in combinations(owners, count):
            options = [list(_block_recipes(layer, path, wanted, cuts)) for path in special]
            rest = {n: s for n, s in wanted.items() if not n.startswith(tuple(f"{p}." for p in special))}
            if not all(options):
                continue
            for pins, fields in _field_solutions(layer, config, {n: now[n] for n in rest}, rest, cuts):
                # A block sees the layer's config as changed, so what it needs of the old one is said again.
                old = {f: getattr(config, f) for f in fields}
                for blocks in product(*options):
                    recipes = [{**block, "config": old | block["config"]} for block in blocks]
                    yield Solution(pins, fields, dict(zip(special, recipes, strict=True)))


def _shapes(module: nn.Module) -> Shapes:
    return {name: tuple(t.shape) for name, t in sources(module).items()}


def _numbers(module: nn.Module) -> list[tuple[str, str, Any]]:
    """Every number that the modules hold: head counts, split sizes, scales."""
    return [
        (path, key, value)
        for path, m in module.named_modules()
        for key, value in vars(m).items()
        if isinstance(value, (int, float)) and key != "training"
    ]


def _owners(layer: nn.Module, cut: Cut) -> list[str]:
    """The blocks of a layer that may have to be built on their own, because a cut goes through them.

    For an inner cut, the smallest block that holds all of it; for one that runs through the whole model, every
    child that it touches. Only blocks that are built from a config count.
    """
    if not cut.inner:
        touched = {name.partition(".")[0] for name, _ in cut.dims}
        return [name for name, child in layer.named_children() if name in touched and _from_config(child)]
    parts = [name.split(".")[:-1] for name, _ in cut.dims]
    path = os.path.commonprefix(parts)
    while path and not _from_config(layer.get_submodule(".".join(path))):
        path = path[:-1]
    return [".".join(path)] if path else []


def _from_config(module: nn.Module) -> bool:
    _, args, kwargs = module.__dict__.get("_constructed_with", (None, (), {}))
    return any(isinstance(a, PreTrainedConfig) for a in (*args, *kwargs.values()))


def _candidates(config: PreTrainedConfig, cuts: list[Cut]) -> dict[tuple[str, int], bool]:
    """Fields that may carry a cut, with the value they would get, and whether the field counts the unit as it is.

    The counting ones come first.
    """
    ratios = list(dict.fromkeys((c.size, c.kept) for c in cuts))
    counts = {count for c in cuts for count in c.counts}
    subsets = [s for n in (1, 2) for s in combinations(ratios, n)]
    found: dict[tuple[str, int], bool] = {}
    for field, value in vars(config).items():
        if field.startswith("_") or field.endswith("token_id") or isinstance(value, bool):
            continue
        if value is None:
            found.update({(field, kept): False for _, kept in ratios})
        elif isinstance(value, int) and value > 1:
            for subset in subsets:
                size, kept = prod(s for s, _ in subset), prod(k for _, k in subset)
                if value % size == 0 and size != kept:
                    found[field, value // size * kept] = value in counts
    return dict(sorted(found.items(), key=lambda item: not item[1]))


def _pins(layer: nn.Module, config: PreTrainedConfig, now: Shapes, cut_dims: set[tuple[str, int]]) -> Overrides:
    """A derived head size, written down so that it stays when head count or hidden size change.

    Only where the architecture reads such a field and the cut touches what depends on it.
    """
    heads, hidden = getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", None)
    if not isinstance(heads, int) or not isinstance(hidden, int) or getattr(config, "head_dim", None) is not None:
        return {}
    other = _try(layer, config, {"head_dim": 2 * (hidden // heads)})
    dependent = {name for name, _ in _changed(now, _shapes(other))} if other is not None else set()
    return {"head_dim": hidden // heads} if dependent & {name for name, _ in cut_dims} else {}


def _try(module: nn.Module, config: PreTrainedConfig, values: Overrides) -> nn.Module | None:
    try:
        with torch.device("meta"), no_init_weights():
            return rebuilt(module, with_values(global_config(config), values))
    except Exception:  # a constructor may refuse a config in any way it likes
        return None


def _field_solutions(
    layer: nn.Module, config: PreTrainedConfig, now: Shapes, wanted: Shapes, cuts: list[Cut]
) -> Iterator[tuple[Overrides, Overrides]]:
    """``(pins, fields)`` that turn exactly the shapes ``now`` into ``wanted``; the fewest fields first."""
    if now == wanted:
        yield {}, {}
        return
    cut_dims = _changed(now, wanted)
    pins = _pins(layer, config, now, cut_dims)
    allowed: dict[tuple[str, int], bool] = {}
    for (field, value), counts in _candidates(config, cuts).items():
        built = _try(layer, config, {**pins, field: value})
        changed = cut_dims if built is None else _changed(now, _shapes(built))
        # A value that is refused alone may make sense together with another.
        if changed and changed <= cut_dims:
            allowed[field, value] = counts
    for fields in _subsets(allowed):
        built = _try(layer, config, pins | fields)
        if built is not None and not _changed(wanted, _shapes(built)):
            yield pins, fields


def _changed(before: Shapes, after: Shapes) -> set[tuple[str, int]]:
    """The dims in which ``after`` differs, over the names of ``before``; a name lost or reshaped differs in dim -1."""
    out = set()
    for name, shape in before.items():
        other = after.get(name, ())
        if len(other) != len(shape):
            out.add((name, -1))
        out |= {(name, d) for d, (a, b) in enumerate(zip(shape, other, strict=False)) if a != b}
    return out


def _subsets(items: dict[tuple[str, int], bool]) -> Iterator[Overrides]:
    """Sets of up to four fields, those that count the units first, small ones first."""
    pool = list(items)[:MAX_CANDIDATES]
    subsets = [
        subset
        for count in range(1, MAX_FIELDS + 1)
        for subset in combinations(pool, count)
        if len({field for field, _ in subset}) == count
    ]
    for subset in sorted(subsets, key=lambda s: (sum(not items[i] for i in s), len(s))):
        yield dict(subset)


def _block_recipes(layer: nn.Module, path: str, wanted: Shapes, cuts: list[Cut]) -> Iterator[Recipe]:
    """One block as if the model were narrower: its inner dims from its config, the others as stated.

    To the fewest fields that give the shapes come those that count the unit and matter to the block, as many
    as the shapes allow: a head count shows in no shape where the width is derived from the hidden size.
    """
    block = layer.get_submodule(path)
    _, args, kwargs = block.__dict__["_constructed_with"]
    config = global_config(next(a for a in (*args, *kwargs.values()) if isinstance(a, PreTrainedConfig)))
    target = {n.removeprefix(f"{path}."): s for n, s in wanted.items() if n.startswith(f"{path}.")}
    mine = [c for c in cuts if c.inner and any(n.startswith(f"{path}.") for n, _ in c.dims)]
    inner = {(n.removeprefix(f"{path}."), d) for c in mine for n, d in c.dims}

    def fits(values: Overrides) -> bool:
        built = _try(block, config, values)
        shapes = {} if built is None else _shapes(built)
        return shapes.keys() == target.keys() and all(shapes[n][d] == target[n][d] for n, d in inner)

    before = (_shapes(block), _numbers(block))
    matters = {}
    for (field, value), counts in _candidates(config, mine).items():
        built = _try(block, config, {field: value})
        if built is None or (_shapes(built), _numbers(built)) != before:
            matters[field, value] = counts
    minimal = next((v for v in chain([{}], _subsets(matters)) if fits(v)), None)
    if minimal is None:
        return
    shapes = {n: list(s) for n, s in target.items()}
    extras = [item for item, counts in matters.items() if counts and item[0] not in minimal][:MAX_FIELDS]
    for count in range(len(extras), -1, -1):
        for subset in combinations(extras, count):
            values = {**minimal, **dict(subset)}
            if len(values) == len(minimal) + count and fits(values):
                yield {"config": values, "shapes": shapes}
