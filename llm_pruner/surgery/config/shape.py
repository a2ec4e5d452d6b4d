"""Solve for a target shape: how many indices each unit keeps for the model to be exactly that of a config."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import compress
from math import prod
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ...choices import SHAPE
from ...errors import PrunerError
from ...graph.units import CouplingGraph, Unit, trace
from ...models.constructors import fields_of
from ...models.per_layer import has_per_layer_widths, set_field
from ...models.skeleton import Shapes, shapes_of, skeleton
from ...selection.plan import PruningPlan
from ..same_axes import find_wrong_axis
from .layer_solver import NO_WIDTH

NEAR = 64  # largest distance of an alternative from a value that cannot be reached


@dataclass(frozen=True)
class Equation:
    """``sum of factor * product of counts = total``: the size of a parameter dim, by the counts of the units in it."""

    where: str
    total: int
    terms: tuple[tuple[float, tuple[str, ...]], ...]

    def solve(self, known: Mapping[str, int]) -> tuple[str, int] | None:
        """Return the one count that is not known yet; None if there are more.

        Raises:
            PrunerError: no count fits.
        """
        unknown = {name for _, names in self.terms for name in names if name not in known}
        if len(unknown) > 1:
            return None
        fixed = sum(f * prod(known[n] for n in names) for f, names in self.terms if unknown.isdisjoint(names))
        slope = sum(
            f * prod(known[n] for n in names if n in known) for f, names in self.terms if not unknown.isdisjoint(names)
        )
        if not unknown:
            if abs(fixed - self.total) > 1e-6:
                raise PrunerError(f"{self.where} would have {fixed:g} channels and not {self.total}")
            return "", 0
        (name,) = unknown
        value = (self.total - fixed) / slope
        if abs(value - round(value)) > 1e-6 or round(value) < 1:
            raise PrunerError(f"{self.where} cannot have {self.total} channels: they go {slope:g} at a time")
        return name, round(value)


def counts_for(graph: CouplingGraph, shapes: Shapes, keeping: tuple[str, ...] = ()) -> dict[str, int]:
    """Return how many indices every unit keeps for the model to get these shapes.

    Args:
        graph: of the model.
        shapes: of every tensor of the model wanted, by name.
        keeping: kinds of units that lose nothing.

    Raises:
        PrunerError: nothing that may be pruned gives these shapes; the message names the first that does not fit.
    """
    units = {u.name: u for u in [*graph.units, *graph.frozen] if u.kind != "layers"}
    equations = _equations(graph, shapes, units)
    frozen = {u.name: u.size for u in graph.frozen if u.kind != "layers"}
    fixed = {u.name: u.size for u in graph.units if u.kind in keeping}
    found = _solved(equations, frozen | fixed, units)
    return {name: count for name, count in found.items() if name not in frozen}


def counts_fitting(
    graph: CouplingGraph, model_class: type[PreTrainedModel], config: PreTrainedConfig
) -> dict[str, int]:
    """Return how many indices every unit keeps for the model to be that of a config.

    Four heads of eight channels have the weights of eight heads of four: the units of the model that the config gives
    say which is meant.

    Raises:
        PrunerError: nothing that may be pruned gives this model.
    """
    shapes = shapes_for(model_class, config)
    problem: PrunerError | None = None
    for keeping in (("channels",), ("heads",), ()):
        try:
            counts = counts_for(graph, shapes, keeping=keeping)
        except PrunerError as error:
            problem = problem or error
            continue
        plan = PruningPlan()
        for unit in graph.units:
            if counts.get(unit.name, unit.size) < unit.size:
                plan.keep(unit, torch.arange(counts[unit.name]), graph.shapes)
        if not (wrong := find_wrong_axis(skeleton(model_class, config), graph, plan)):
            return counts
        problem = problem or PrunerError(wrong)
    assert problem is not None
    raise problem


def _equations(graph: CouplingGraph, shapes: Shapes, units: dict[str, Unit]) -> list[Equation]:
    by_dim: dict[tuple[str, int], list[Unit]] = {}
    for unit in units.values():
        for key in unit.dims:
            by_dim.setdefault(key, []).append(unit)
    equations = []
    compositions: dict[tuple[int, ...], list[tuple[list[bool], int]]] = {}  # dims of one form share their labels
    for name, shape in graph.shapes.items():
        if name not in shapes or len(shapes[name]) != len(shape):
            raise PrunerError(f"the config has no {name} as the model has")
        for dim, (size, total) in enumerate(zip(shape, shapes[name], strict=True)):
            here = by_dim.get((name, dim), [])
            if size == total and not here:
                continue
            if not here:
                raise PrunerError(f"{name} has {size} channels in dim {dim}, which cannot become {total}")
            form = tuple(id(unit.dims[name, dim]) for unit in here)
            if form not in compositions:
                compositions[form] = _composition([unit.dims[name, dim] for unit in here])
            terms = []
            for combination, positions in compositions[form]:
                through = list(compress(here, combination))
                terms.append((positions / prod(u.size for u in through), tuple(u.name for u in through)))
            equations.append(Equation(f"{name} (dim {dim})", total, tuple(sorted(terms))))
    if extra := sorted(shapes.keys() - graph.shapes.keys()):
        raise PrunerError(f"the config asks for {extra[0]}, which the model does not have")
    return equations


def _composition(labels: list[torch.Tensor]) -> list[tuple[list[bool], int]]:
    """Return every combination of units that meets in a dim, as a flag for each unit, and in how many positions.

    Args:
        labels: index of each unit at every position ``[positions]``, -1 where the unit is not.
    """
    belongs = torch.stack([label >= 0 for label in labels])  # [units, positions]
    combinations, counts = belongs.unique(dim=1, return_counts=True)
    return list(zip(combinations.T.tolist(), counts.tolist(), strict=True))


def _solved(equations: list[Equation], known: dict[str, int], units: dict[str, Unit]) -> dict[str, int]:
    """Return the counts that fit all equations: those that stand alone in one first; where there are none, one is
    tried."""
    known = dict(known)
    left = list(dict.fromkeys(equations))
    while left:
        later = []
        for equation in left:
            found = equation.solve(known)
            if found is None:
                later.append(equation)
            elif found[0]:
                name, value = found
                if value > units[name].size:
                    raise PrunerError(
                        f"{equation.where} cannot grow: {name} has {units[name].size} indices, not {value}"
                    )
                if value < units[name].minimum:
                    raise PrunerError(f"{name} has to keep at least {units[name].minimum} indices, not {value}")
                known[name] = value
        if len(later) == len(left):
            return _tried(left, known, units)
        left = later
    return known


def _tried(equations: list[Equation], known: dict[str, int], units: dict[str, Unit]) -> dict[str, int]:
    """Try the values of one of two counts that only occur together, as in fused projections of q, k and v."""
    names = sorted(
        {n for e in equations for _, ns in e.terms for n in ns if n not in known}, key=lambda n: units[n].size
    )
    # Those that hang together with the first, and no others, so that a failure is this part's own.
    part, group = list[Equation](), {names[0]}
    while more := [e for e in equations if e not in part and any(n in group for _, ns in e.terms for n in ns)]:
        part += more
        group |= {n for e in more for _, ns in e.terms for n in ns if n not in known}
    problem: PrunerError | None = None
    for value in range(units[names[0]].size, 0, -1):
        try:
            found = _solved(part, known | {names[0]: value}, units)
        except PrunerError as error:
            problem = problem or error
            continue
        rest = [e for e in equations if e not in part]
        return _solved(rest, found, units) if rest else found
    assert problem is not None
    raise problem


def layer_counts(graph: CouplingGraph, shapes: Shapes) -> dict[str, int]:
    """Return how many layers each stack keeps, by the name of its unit.

    Raises:
        PrunerError: more than it has, or none.
    """
    counts = {}
    for unit in graph.of_kind("layers"):
        path = unit.name.removesuffix("layers")
        indices = {name.removeprefix(path).partition(".")[0] for name in shapes if name.startswith(path)}
        if not 1 <= len(indices) <= unit.size:
            raise PrunerError(
                f"{path[:-1]} has {unit.size} layers and cannot keep {len(indices)}: give 1 to {unit.size}"
            )
        counts[unit.name] = len(indices)
    return counts


def _reason(error: Exception) -> str:
    """Return why a config refuses its fields, without the names of validators and exceptions around the reason."""
    text = " ".join(str(error).split())
    return re.sub(r"Class validation error for validator '\w+': (\w+: )?", "", text).rstrip(".")


def shapes_for(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> Shapes:
    """Return the shapes of the model of a config.

    Raises:
        PrunerError: the architecture refuses the config.
    """
    try:
        config.validate()
        return shapes_of(skeleton(model_class, config))
    except Exception as error:  # a constructor may refuse a config in any way it likes
        raise PrunerError(f"{type(config).__name__} refuses it: {_reason(error)}") from error


def target_config(model: PreTrainedModel, wanted: Mapping[str, Any]) -> PreTrainedConfig:
    """Return the model's config with some fields changed.

    The fields of :data:`SHAPE` have these names for every architecture, other fields the names that its config uses.

    Raises:
        PrunerError: the architecture has no such field.
    """
    if has_per_layer_widths(model.config):
        raise PrunerError("the layers of this model differ: a target shape is for models whose layers are equal")
    config = copy.deepcopy(model.config)
    wanted = dict(wanted)
    if getattr(config, "num_key_value_heads", None) == getattr(config, "num_attention_heads", 0):  # none are shared
        heads = wanted.get("num_attention_heads")
        if heads is not None:
            wanted.setdefault("num_key_value_heads", heads)
    for name, value in wanted.items():
        for field in _fields(model, config, name, value):
            set_field(config, field, value)
    head_dim = _head_dim(model.config)
    if head_dim is not None and _head_dim(config) != head_dim and "head_dim" not in wanted:
        pinned = copy.deepcopy(config)  # written down where it would be derived anew, if the architecture reads it
        pinned.head_dim = head_dim
        if _builds(type(model), pinned) not in ({}, _builds(type(model), config)):
            config = pinned
    lists = {n: v for n, v in vars(model.config).items() if isinstance(v, list)}
    before, after = _layers(model.config), _layers(config)
    for name, value in lists.items():
        if before and after and len(value) == before != after:
            setattr(config, name, value[:after])  # the pattern is that of the layers chosen, once these are known
    return config


def _builds(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> Shapes:
    """Return the shapes that a config gives, none where it is refused."""
    try:
        return shapes_for(model_class, config)
    except PrunerError:
        return {}


def _layers(config: PreTrainedConfig) -> int | None:
    return getattr(config, "num_hidden_layers", None)


def _head_dim(config: PreTrainedConfig) -> int | None:
    heads, hidden = getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", None)
    given = getattr(config, "head_dim", None)
    if isinstance(given, int):
        return given
    return hidden // heads if isinstance(heads, int) and isinstance(hidden, int) and heads else None


def _fields(model: PreTrainedModel, config: PreTrainedConfig, name: str, value: Any) -> list[str]:
    """Return the fields that a flag names."""
    mapped = config.attribute_map.get(name, name)
    fields = fields_of(config)
    if mapped in fields and (fields[mapped] is not None or SHAPE.get(name) != "neurons"):
        return [mapped]
    if SHAPE.get(name) in ("neurons", "layers") and isinstance(value, int):
        found = _by_trying(model, config, name, value)
        if found:
            return found
    known = ", ".join(sorted(n for n, v in fields.items() if type(v) is int and not NO_WIDTH.search(n)))
    raise PrunerError(f"{type(config).__name__} has no {name}; its sizes are {known}")


def _by_trying(model: PreTrainedModel, config: PreTrainedConfig, name: str, value: int) -> list[str]:
    """Return the fields that change the units of a flag's kind, and nothing else."""
    twin = skeleton(type(model), model.config)
    graph, plain = trace(twin), shapes_of(twin)
    cut_dims = {key for unit in graph.of_kind(SHAPE[name]) for key in unit.dims}
    names = []
    for field, now in fields_of(model.config).items():
        if isinstance(now, bool) or not (now is None or isinstance(now, int)) or now == value:
            continue
        if SHAPE[name] == "neurons" and NO_WIDTH.search(field):
            continue
        tried = copy.deepcopy(model.config)
        try:
            set_field(tried, field, value)
            shapes = shapes_of(skeleton(type(model), tried))
        except Exception:  # a constructor may refuse a config in any way it likes
            continue
        if SHAPE[name] == "layers":
            lost = plain.keys() - shapes.keys()
            if lost and all("decoder" in n for n in lost):
                names.append(field)
            continue
        changed = {(n, d) for n, s in shapes.items() for d, size in enumerate(s) if size != plain.get(n, s)[d]}
        if shapes.keys() == plain.keys() and changed and changed <= cut_dims:
            names.append(field)
    return names


def nearest(model: PreTrainedModel, wanted: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield changes of one field each that make a shape reachable, the nearest first.

    The search uses a model of the same widths and one layer, if such a model can be built.
    """
    small = copy.deepcopy(model.config)
    try:
        set_field(small, small.attribute_map.get("num_hidden_layers", "num_hidden_layers"), 1)
        twin = skeleton(type(model), small)
        graph = trace(twin)
    except Exception:  # lists with an entry for each layer, say
        twin = skeleton(type(model), model.config)
        graph = trace(twin)
    widths = {name: value for name, value in wanted.items() if SHAPE.get(name) != "layers" and isinstance(value, int)}

    def fits(changed: Mapping[str, Any]) -> bool:
        try:
            counts_fitting(graph, type(model), target_config(twin, changed))
        except PrunerError:
            return False
        return True

    for name, value in widths.items():
        for step in (-1, 1):
            other = next(
                (v for d in range(1, NEAR + 1) if (v := value + step * d) > 0 and fits(widths | {name: v})), None
            )
            if other is not None:
                yield name, other
