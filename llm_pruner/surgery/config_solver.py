"""Finds the config whose model has exactly the shapes that a plan leaves.

No field is known by name. A field may be the one if its value is a multiple of a unit's size; it is one if
changing it changes, on the meta device, dims that the plan cuts and no others. Layers are solved one at a
time, each built by its own constructor; fields on which all layers agree are then lifted to the config
itself, and what is left becomes per-layer (:mod:`llm_pruner.surgery.heterogeneous`). Shapes can agree by
coincidence, so :func:`llm_pruner.apply` traces the result and compares units before it trusts it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from ..errors import PrunerError
from ..graph import CouplingGraph, sources
from ..selection import PruningPlan
from .heterogeneous import SUBMODULES, Overrides, record_constructors, stack_of, with_values
from .layer_solver import Cut, LayerSolver, Recipe, Shapes, Solution, candidates, shapes_of
from .slicing import cut_shape, renamed

MAX_ATTEMPTS = 32


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
    stack = cast(nn.ModuleList, base.get_submodule(prefix))
    solver = LayerSolver()
    origin = plan.layers[prefix].tolist() if prefix in plan.layers else range(len(stack))
    problem: PrunerError | None = None
    for attempt in range(MAX_ATTEMPTS):
        solutions = []
        for i, old in enumerate(origin):
            path = f"{prefix}.{i}."
            wanted = {n.removeprefix(path): s for n, s in targets.items() if n.startswith(path)}
            cuts = _cuts(plan, graph, f"{prefix}.{old}.")
            solutions.append(solver.solve(stack[i], _layer_config(text, i), wanted, cuts, attempt))
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
        text.per_layer_config = cast(Any, layers)
    known: dict[str, dict[str, Recipe]] = copy.deepcopy(getattr(text, SUBMODULES, None) or {})
    for i, solution in enumerate(solutions):
        for path, recipe in solution.blocks.items():
            before = known.setdefault(str(i), {}).get(path, {"values": {}})
            known[str(i)][path] = {"values": before["values"] | recipe["values"], "shapes": recipe["shapes"]}
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
        extra = [dict([item]) for item, counts in candidates(vars(config), cuts).items() if counts]
        for fields in [{}, *extra]:
            tried = with_values(config, fields) if fields else config
            try:
                shapes = shapes_of(skeleton(type(model), tried))
            except Exception as error:  # a constructor may refuse a config in any way it likes
                problem = problem or f"{type(error).__name__}: {error}"
                continue
            wrong = [n for n in targets.keys() | shapes.keys() if shapes.get(n) != targets.get(n)]
            if not wrong:
                return tried
            name = min(wrong)
            problem = problem or f"{name} would be {shapes.get(name)} instead of {targets.get(name)}"
    raise PrunerError(f"no config of {type(model.config).__name__} has the shapes that the plan leaves: {problem}")
