"""Find the config whose model has exactly the shapes that a plan leaves.

No field is known by name. A field is a candidate if its value is a multiple of a unit's size; it is a solution if
changing it changes, on the meta device, dims that the plan cuts and no others. Layers are solved one at a time, each
built by its own constructor. Fields on which all layers agree are then lifted to the config itself; the others become
per-layer (:mod:`llm_pruner.models.per_layer`). Shapes can agree by coincidence, so :func:`llm_pruner.apply` traces the
result and compares units before it trusts a config.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ...errors import PrunerError
from ...graph.units import CouplingGraph
from ...models.constructors import config_of, constructor_arguments, fields_of, refusal
from ...models.layers import is_below
from ...models.per_layer import (
    CONSTANTS,
    SUBMODULES,
    Overrides,
    layer_overrides_of,
    overrides_of,
    set_field,
    with_values,
)
from ...models.running import stored_tensors
from ...models.skeleton import Shapes, names_of, shapes_of, skeleton
from ...selection.plan import PruningPlan, name_after
from .layer_solver import Cut, LayerSolver, Recipe, Solution, candidates
from .stacks import Stack, configs_in, stacks_of, without_blocks, without_layers
from .token_ids import renumber

MAX_ATTEMPTS = 32
# Fields that are set once in a config: those on which all layers that need them agree (dense and sparse layers may
# differ), those on which really all layers agree, none. The first that fits is the plainest.
LIFTS = ("any", "all", "none")


@dataclass(frozen=True, kw_only=True)
class LayerJob:
    """A layer that changes: ``target`` shapes that it must get, and the cuts that touch it."""

    stack: Stack
    index: int
    layer: nn.Module
    target: Shapes
    cuts: list[Cut]

    @property
    def key(self) -> tuple[str, int]:
        return self.stack.path, self.index


def solve(model: PreTrainedModel, plan: PruningPlan, graph: CouplingGraph) -> Iterator[PreTrainedConfig]:
    """Yield configs of the pruned model, the likeliest first.

    All give the right shapes; the caller picks one that also gives the right units.

    Args:
        model: model to be pruned; only its class, config and shapes are read.
        graph: its units.

    Raises:
        PrunerError: no config expresses the shapes; the message names the first tensors that do not fit.
    """
    targets = _target_shapes(model, plan)
    config = _config_without_dropped(model, plan, graph)
    base = skeleton(type(model), config)
    stacks = stacks_of(base)
    jobs = [job for stack in stacks for job in _jobs(base, stack, targets, _layer_cuts(model, plan, graph))]
    cuts_hidden = any(choice.kind == "hidden" for choice in plan.units.values())
    solver, fits = LayerSolver(), False
    problem: PrunerError | None = None
    for attempt in range(MAX_ATTEMPTS):
        solved = {job.key: solver.solve(job.layer, job.target, job.cuts, attempt) for job in jobs}
        if attempt and not solver.progressed(attempt):
            break
        for assembled in _assemble_lifts(config, stacks, solved, lambda c: _cut_constants(c, stacks, plan, graph)):
            try:
                fitting = _checked(model, assembled, targets, plan)
            except PrunerError as error:  # another may fit
                problem = problem or error
                continue
            fits = True
            if cuts_hidden:
                yield from _keeping_constants(base, fitting, stacks)
            yield fitting
    if problem and not fits:
        raise problem


def _target_shapes(model: PreTrainedModel, plan: PruningPlan) -> Shapes:
    """Return the shape of every stored tensor after the plan, under all its names."""
    names = names_of(model)
    return {
        new: plan.cut_shape(name, tensor.shape)
        for name, tensor in stored_tensors(model).items()
        for alias in names[name]
        if (new := name_after(alias, plan)) is not None
    }


def _config_without_dropped(model: PreTrainedModel, plan: PruningPlan, graph: CouplingGraph) -> PreTrainedConfig:
    """Return the model's config without the layers, tokens and blocks that a plan drops; widths are as before."""
    config = copy.deepcopy(model.config)
    if plan.layers:
        config = without_layers(model, config, stacks_of(model), plan)
    if plan.tokens is not None:
        text = config.get_text_config()
        size = text.vocab_size
        for name, value in vars(text).items():
            if name.startswith("vocab_size") and value == size:  # embeddings of every layer have a field of their own
                setattr(text, name, len(plan.tokens))
        renumber(config, plan.tokens)
    if plan.blocks:
        without_blocks(model, config, plan, graph)
    return config


def _jobs(
    base: PreTrainedModel, stack: Stack, targets: Shapes, cuts: Callable[[Stack, int], list[Cut]]
) -> Iterator[LayerJob]:
    """Yield the layers of a stack that change."""
    for i, layer in enumerate(cast(nn.ModuleList, base.get_submodule(stack.path))):
        path = f"{stack.path}.{i}."
        target = {name.removeprefix(path): shape for name, shape in targets.items() if name.startswith(path)}
        if target != shapes_of(layer):
            yield LayerJob(stack=stack, index=i, layer=layer, target=target, cuts=cuts(stack, i))


def _layer_cuts(model: PreTrainedModel, plan: PruningPlan, graph: CouplingGraph) -> Callable[[Stack, int], list[Cut]]:
    """Return a function that lists the cuts that touch a layer, by its index after the plan."""
    names = names_of(model)

    def cuts(stack: Stack, index: int) -> list[Cut]:
        kept = plan.layers.get(stack.path)
        original = index if kept is None else int(kept[index])
        return _cuts(plan, graph, names, f"{stack.path}.{original}.")

    return cuts


def _assemble_lifts(
    config: PreTrainedConfig,
    stacks: list[Stack],
    solved: dict[tuple[str, int], Solution],
    finish: Callable[[PreTrainedConfig], None],
) -> Iterator[PreTrainedConfig]:
    """Yield the different configs that :data:`LIFTS` give, each finished."""
    tried: list[dict[str, Any]] = []
    for lift in LIFTS:
        assembled = _assemble(config, stacks, solved, lift)
        finish(assembled)
        if (content := assembled.to_dict()) not in tried:
            tried.append(content)
            yield assembled


def _cuts(plan: PruningPlan, graph: CouplingGraph, known: dict[str, list[str]], path: str) -> list[Cut]:
    """List the cuts that touch one layer, with parameter names relative to it."""
    units = {unit.name: unit for unit in [*graph.units, *graph.frozen]}
    groups = [u for u in units.values() if u.kind == "query_heads"]
    cuts = []
    for name, choice in plan.units.items():
        dims = set(units[name].dims)
        here = {(p.removeprefix(path), d) for first, d in dims for p in known[first] if p.startswith(path)}
        if here and choice.kind != "layers":
            counts = {choice.size} | {choice.size * u.size for u in groups if dims & set(u.dims)}
            heads = choice.kind in ("heads", "query_heads")
            cuts.append(Cut(choice.size, choice.kept.numel(), here, len(here) == len(dims), counts, heads))
    return cuts


def _assemble(
    config: PreTrainedConfig, stacks: list[Stack], solved: dict[tuple[str, int], Solution], lift: str
) -> PreTrainedConfig:
    """Merge the solutions of all layers into one config; ``lift`` says which fields are set once."""
    config = copy.deepcopy(config)
    for where, part in list(configs_in(config)):
        members = [stack for stack in stacks if stack.config == where]
        solutions = {s.path: [solved.get((s.path, i), Solution()) for i in range(s.length)] for s in members}
        every = [solution for layers in solutions.values() for solution in layers]
        if not any(s.fields or s.pins or s.blocks for s in every):
            continue
        common = {field: value for s in every for field, value in s.pins.items()}
        if lift != "none":
            common |= _shared(list(solutions.values()), lift == "all")
        _write(part, common, members, solutions)
    return config


def _shared(stacks: list[list[Solution]], strict: bool) -> Overrides:
    """Return the fields on which all layers that change them agree; with ``strict``, all layers of a stack must."""
    shared: Overrides = {}
    for layers in stacks:
        for field in dict.fromkeys(field for solution in layers for field in solution.fields):
            rest = [s.fields for other in stacks for s in other if field in s.fields or (strict and other is layers)]
            if all(fields.get(field) == rest[0].get(field) for fields in rest):
                shared[field] = rest[0][field]
    return shared


def _write(
    config: PreTrainedConfig, common: Overrides, stacks: list[Stack], solutions: dict[str, list[Solution]]
) -> None:
    """Write what stacks of layers need into their config: ``common`` fields once, the others per layer or block."""
    layers = {i: dict(own) for i, own in layer_overrides_of(config).items()}
    if config.is_heterogeneous:
        config.per_layer_config = None
    blocks: dict[str, Recipe] = copy.deepcopy(overrides_of(config))
    for field, value in common.items():
        set_field(config, field, value)
    for stack in stacks:
        for i, solution in enumerate(solutions[stack.path]):
            own = {f: v for f, v in solution.fields.items() if f not in common}
            recipes = {stack.inside(i, path): recipe for path, recipe in solution.blocks.items()}
            if stack.standard and not any("." in field for field in own):
                layers[i] = {f: v for f, v in layers.get(i, {}).items() if f not in common} | own
            elif own:
                recipes = {stack.inside(i): {"values": own, "shapes": {}}} | recipes
            for path, recipe in recipes.items():
                _merge_recipe(blocks, path, recipe)
    layers = {i: own for i, own in layers.items() if own}
    if layers:
        # Validators and caches read the global value of fields that layers override.
        config.allow_global_per_layer_attribute_access = True
        config.per_layer_config = cast(Any, layers)
    if blocks:
        setattr(config, SUBMODULES, blocks)


def _merge_recipe(blocks: dict[str, Recipe], path: str, recipe: Recipe) -> None:
    """Add a recipe to that of a block: values are merged, shapes replaced."""
    before = blocks.get(path, {"values": {}})
    blocks[path] = before | {"values": before["values"] | recipe["values"], "shapes": recipe["shapes"]}


def _cut_constants(config: PreTrainedConfig, stacks: list[Stack], plan: PruningPlan, graph: CouplingGraph) -> None:
    """Write which part of a constant every layer keeps into the configs."""
    parts = dict(configs_in(config))
    cut = [(c, plan.units[u.name].kept.tolist()) for u in graph.units if u.name in plan.units for c in u.constants]
    for constant, kept in sorted(cut, key=lambda item: -item[0].inner):  # outer axes first
        path = name_after(f"{constant.layer}.", plan)
        stack = next((s for s in stacks if path and path.rpartition(".")[0].startswith(f"{s.path}.")), None)
        if path is None or stack is None:
            continue
        known = parts[stack.config].__dict__.setdefault(CONSTANTS, {})
        entry = {k: v for k, v in vars(constant).items() if k != "layer"} | {"kept": kept}
        known.setdefault(stack.inside(int(path.split(".")[-2])), []).append(entry)


def _keeping_constants(
    base: PreTrainedModel, config: PreTrainedConfig, stacks: list[Stack]
) -> Iterator[PreTrainedConfig]:
    """Yield the config with its constants restored, if it changes any.

    With the hidden size, a config also changes what is derived from it: rotary tables where it gives head_dim, the
    factor on embeddings (Gemma, Pegasus), on logits (T5), inside attention (LongCat). Whole numbers are restored
    first, too, since T5's factor is made of one; where such a number is a width after all, the model does not run and
    the next config is tried.
    """
    modules = list(skeleton(type(base), config).named_modules())
    parts = dict(configs_in(config))
    for numbers in ((int, float), (float,)):
        blocks: dict[tuple[str, ...], dict[str, Recipe]] = {}
        for path, module in modules:
            stack = next((s for s in stacks if path == s.scope or is_below(s.scope, path)), None)
            if stack is None:
                continue
            inside = any(is_below(s.path, path) for s in stacks)
            if recipe := _restoring(base.get_submodule(path), module, numbers, inside):
                inner = path.removeprefix(stack.scope).removeprefix(".")
                known = overrides_of(parts[stack.config]).get(inner, {})
                blocks.setdefault(stack.config, {})[inner] = recipe | {
                    key: recipe[key] | known.get(key, {}) for key in ("values", "shapes")
                }
        if blocks:
            out = copy.deepcopy(config)
            for where, part in configs_in(out):
                if where in blocks:
                    setattr(part, SUBMODULES, overrides_of(part) | blocks[where])
            yield out


def _restoring(old: nn.Module, new: nn.Module, numbers: tuple[type, ...], inside: bool) -> Recipe | None:
    """Return the recipe that restores a module's constants, inside layers only factors; None if none changed."""

    def changed(before: dict[str, Any], after: dict[str, Any], types: tuple[type, ...]) -> dict[str, Any]:
        return {n: v for n, v in before.items() if type(v) in types and after.get(n) != v}

    if inside or isinstance(new, PreTrainedModel):
        attributes = changed(vars(old), vars(new), (float,) if inside else numbers)
        return {"values": {}, "shapes": {}, "attributes": attributes} if attributes else None
    values = changed(constructor_arguments(old) or {}, constructor_arguments(new) or {}, (float,))
    before, after = ({n: b.shape for n, b in m.named_buffers(recurse=False)} for m in (old, new))
    if before != after and config_of(new) is not None:
        values |= changed(vars(config_of(old)), vars(config_of(new)), (int,))
    return {"values": values, "shapes": {}} if values else None


def _checked(model: PreTrainedModel, config: PreTrainedConfig, targets: Shapes, plan: PruningPlan) -> PreTrainedConfig:
    """Return the config that builds exactly the target shapes, if need be with one more field changed.

    The extra field is for widths that the layers do not see, such as that of an embedding with a projection of its own.
    """
    cuts = [Cut(c.size, c.kept.numel(), set(), False, {c.size}) for c in plan.units.values() if c.layer is None]
    problem = ""
    canonical = {new for name in stored_tensors(model) if (new := name_after(name, plan)) is not None}
    extra = [dict([item]) for item, counts in candidates(fields_of(config), cuts).items() if counts]
    for fields in [{}, *extra]:
        tried = with_values(config, fields) if fields else config
        try:
            shapes = shapes_of(skeleton(type(model), tried))
        except Exception as error:  # a constructor may refuse a config in any way it likes
            problem = problem or f"{type(error).__name__}: {error}"
            continue
        wrong = [n for n in canonical | shapes.keys() if shapes.get(n) != targets.get(n)]
        if wrong:
            name = min(wrong)
            problem = problem or f"{name} would be {shapes.get(name)} instead of {targets.get(name)}"
        elif (invalid := refusal(tried)) and not refusal(model.config):
            problem = problem or invalid
        else:
            return tried
    raise PrunerError(f"no config of {type(model.config).__name__} has the shapes that the plan leaves: {problem}")
