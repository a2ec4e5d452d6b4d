"""Carrying out a plan: slice the weights, rebuild the model from a config, prove that both agree."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace

import torch
from accelerate import init_empty_weights
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from ..errors import PrunerError
from ..graph import CouplingGraph, TraceError, model_inputs, native, remember, sources, streamed, trace, traceable
from ..graph.verify import random_tokens, relative_difference
from ..selection import PruningPlan, renamed
from . import config_solver
from .layers import skeleton
from .norms import KeptNorms, kept_norms
from .slicing import check_fits, cut, masked
from .tokens import renumber

Place = Callable[[torch.Tensor], torch.Tensor]


def in_memory(tensor: torch.Tensor) -> torch.Tensor:
    """Where tensors live unless something else is said."""
    return tensor


def apply(
    model: PreTrainedModel, plan: PruningPlan, place: Place = in_memory, config: PreTrainedConfig | None = None
) -> PreTrainedModel:
    """A new, smaller model of the same class; the original is untouched.

    The new model is built from a config, so that every attribute is right by construction, and traced: its
    units must be the original's at the sizes that the plan says. Weights keep dtype and device.

    Args:
        place: puts each new tensor where it is to live and returns it there
            (:func:`llm_pruner.checkpoint.on_disk`: in files, for models larger than memory).
        config: that the new model must have, instead of one that is found. What an architecture derives from sizes is
            then as this config has it, and may differ from the original's: the factor on Gemma's embeddings, say.
            A plan that was made for a shape (``settings["shape"]``) says so itself.

    Raises:
        PrunerError: the plan is for another model, or no config expresses what it leaves.
    """
    check_fits({name: tuple(t.shape) for name, t in sources(model).items()}, plan)
    if config is None and isinstance(shape := plan.settings.get("shape"), dict):
        from .target import target_config  # which needs this module

        config = target_config(model, shape)
    graph = trace(model)
    known = {unit.name for unit in [*graph.units, *graph.frozen]}
    unknown = [name for name in plan.units if name not in known]
    if unknown:
        raise PrunerError(f"the plan was made for another model: it has no unit {unknown[0]}")
    problems: list[str] = []
    configs = config_solver.solve(model, plan, graph) if config is None else iter([config])
    for found in configs:
        try:
            # Looked at on the meta device, before any weight is copied, unless the model needs them to run.
            rebuilt = skeleton(type(model), found) if graph.on_meta else _fill(model, plan, found, place)
            problem = wrong_axis(rebuilt, graph, plan) or _broken_cache(rebuilt, model)
        except TraceError as error:
            problem = str(error)
        if not problem:
            pruned = _fill(model, plan, found, place) if graph.on_meta else rebuilt
            remember(pruned, rebuilt)
            problem = "" if config is not None else _wrong_factor(model, pruned, plan, graph)
            if not problem:
                if plan.tokens is not None and pruned.can_generate():
                    renumber(pruned.generation_config, plan.tokens)
                return pruned
            if problem in problems:  # no other config will do better
                break
        problems.append(problem)
    raise PrunerError(f"no config of {type(model.config).__name__} carries the plan: {problems[0]}")


def wrong_axis(rebuilt: PreTrainedModel, original: CouplingGraph, plan: PruningPlan) -> str:
    """What a rebuilt model has otherwise than the plan says; shapes can agree while head counts do not."""
    expected = _axes(original, plan)
    for key, sizes in _axes(trace(rebuilt), PruningPlan()).items():
        if sizes != expected[key]:
            return (
                f"{key[0]} has axes {sizes} (size, stride, whether of heads) in dim {key[1]} of the rebuilt model, "
                f"not {expected[key]}"
            )
    return ""


def _wrong_factor(model: PreTrainedModel, pruned: PreTrainedModel, plan: PruningPlan, graph: CouplingGraph) -> str:
    """Whether something beside widths has changed with the hidden size: some models make factors of it.

    No shape shows that, so the two models are compared, if there are weights to do so.
    """
    kinds = {choice.kind for choice in plan.units.values()}
    if "hidden" not in kinds or any(tensor.device.type == "meta" for tensor in sources(model).values()):
        return ""
    if not kinds <= MASKABLE:  # what has no masked twin is left out, and the rest must do without another factor
        rest = PruningPlan(blocks=plan.blocks)
        for name, choice in plan.units.items():
            if choice.kind in MASKABLE:
                rest.keep(graph.unit(name), choice.kept, graph.shapes)
        try:
            apply(model, rest)
        except PrunerError as error:
            return str(error)
        return ""
    half = model.dtype in (torch.float16, torch.bfloat16)
    ids = random_tokens(pruned, rows=2, tokens=16)
    report = _compare(model, pruned, plan, ids, model.dtype, 0.05 if half else 0.01, kept_norms(graph, plan))
    if report.equivalent:
        return ""
    return f"it computes something from the hidden size that must not change (logits are off by {report.relative:.1e})"


def _broken_cache(rebuilt: PreTrainedModel, original: PreTrainedModel) -> str:
    """What goes wrong when a rebuilt model is asked to fill its cache, if the original can do so."""

    def problem(model: PreTrainedModel) -> str:
        ids = torch.ones(2, 16, dtype=torch.long, device=model.device)
        try:
            with torch.no_grad(), traceable(model):
                model(**model_inputs(model, ids), use_cache=True)
        except Exception as error:  # a model may fail in any way it likes
            return f"its cache does not take the new sizes: {type(error).__name__}: {error}"
        return ""

    found = problem(rebuilt)
    return found if found and not problem(skeleton(type(original), original.config)) else ""


def _axes(graph: CouplingGraph, plan: PruningPlan) -> dict[tuple[str, int], list[tuple[int, int, bool]]]:
    """The axes that every parameter dim is made of after the plan: size, stride and whether the indices are heads.

    The stride tells three heads of four channels from four heads of three; that they are heads, one of four channels
    from four of one.
    """
    out: dict[tuple[str, int], list[tuple[int, int, bool]]] = defaultdict(list)
    strides: dict[tuple[int, int], int] = {}  # by label and what of it is kept, which many dims share
    for unit in [*graph.units, *graph.frozen]:
        if unit.kind == "layers":
            continue
        size = plan.units[unit.name].kept.numel() if unit.name in plan.units else unit.size
        for (name, dim), label in unit.dims.items():
            new = renamed(name, plan)
            if new is None or size == 1:  # an axis of one index is no axis any more
                continue
            kept = plan.kept.get(name, {}).get(dim)
            key = id(label), id(kept)
            if key not in strides:
                strides[key] = _stride(label if kept is None else label[kept])
            out[new, dim].append((size, strides[key], unit.kind in ("heads", "query_heads")))
    return defaultdict(list, {key: sorted(axes) for key, axes in out.items()})


def _stride(label: torch.Tensor) -> int:
    """How many positions the first index has, from the first position on."""
    if not len(label) or label[0] < 0:
        return 0
    others = (label != label[0]).nonzero()
    return int(others[0]) if len(others) else len(label)


def _fill(model: PreTrainedModel, plan: PruningPlan, config: PreTrainedConfig, place: Place) -> PreTrainedModel:
    # Tied tensors are cut once, under the name that the plan knows.
    canonical = config_solver.canonical_names(model)
    tensors = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])
    done: dict[str, torch.Tensor] = {}
    state = {}
    for name in model.state_dict():
        new = renamed(name, plan)
        if new is not None:
            key = canonical[name]
            if key not in done:
                done[key] = place(cut(key, tensors[name].detach(), plan))
            state[new] = done[key]
    return rebuilt_from(config, state, model)


def rebuilt_from(config: PreTrainedConfig, state: dict[str, torch.Tensor], model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same class as ``model``, of another config and with these tensors, which it takes over."""
    # Weights are not allocated twice; tables that no checkpoint holds are computed.
    on_meta = model.device.type == "meta"
    with torch.device("meta") if on_meta else init_empty_weights(include_buffers=False), no_init_weights():
        pruned = type(model)._from_config(
            config, dtype=model.dtype, attn_implementation=model.config._attn_implementation
        )
    pruned.load_state_dict(state, strict=True, assign=True)
    pruned.tie_weights()
    if model.can_generate():
        pruned.generation_config = copy.deepcopy(model.generation_config)
    for path, module in pruned.named_modules():  # buffers that no checkpoint holds stay as constructed
        for key, buffer in module.named_buffers(recurse=False):
            setattr(module, key, buffer.to(_device_at(pruned, path)))
    return pruned.train(model.training)


def _device_at(model: PreTrainedModel, path: str) -> torch.device:
    """Where the weights of a module lie; of one without, those of the module around it."""
    while (weight := next(model.get_submodule(path).parameters(), None)) is None:
        path = path.rpartition(".")[0]
    return weight.device


# Kinds of units whose removal is the same as zeros in their place, given norms that know.
MASKABLE = {"hidden", "heads", "query_heads", "neurons", "layers", "vocabulary"}


@dataclass
class EquivalenceReport:
    """Outcome of :func:`verify`.

    Attributes:
        max_abs_diff: largest absolute difference of two logits.
        relative: the same over the largest absolute logit.
        tolerance: what ``relative`` may be at most.
        precision: in which the two were compared.
    """

    max_abs_diff: float
    relative: float
    tolerance: float
    precision: torch.dtype

    @property
    def equivalent(self) -> bool:
        return self.relative <= self.tolerance


def verify(
    model: PreTrainedModel,
    pruned: PreTrainedModel,
    plan: PruningPlan,
    tokens: torch.Tensor | None = None,
    seed: int = 0,
    tolerance: float = 1e-5,
) -> EquivalenceReport:
    """Mask equivalence: do the pruned model's logits equal the original's with the removed slices zeroed?

    Holds for units without flags, and for hidden channels, for which norms are made to look at the kept channels
    only. The two differ in the order in which sums are taken, which a badly damaged model can amplify beyond any
    tolerance; where they do, they are compared again in float64, one model at a time, which tells rounding from a
    mistake.

    Args:
        tokens: LongTensor ``[rows, tokens]`` to compare on, of the pruned model's; random ones by default. Where the
            plan cuts the vocabulary, the original reads the same tokens by its own numbers.
        tolerance: for the largest difference relative to the largest logit.

    Raises:
        PrunerError: the plan is for another model.
    """
    check_fits({name: tuple(t.shape) for name, t in sources(model).items()}, plan)
    ids = random_tokens(pruned, rows=2, tokens=16, seed=seed) if tokens is None else tokens
    hidden = any(choice.kind == "hidden" for choice in plan.units.values())
    modes = kept_norms(trace(model), plan) if hidden else []
    report = _compare(model, pruned, plan, ids, native(model).dtype, tolerance, modes)
    if not report.equivalent and model.dtype is not torch.float64:
        with suppress(RuntimeError):  # some models insist on float32 somewhere
            report = _compare(model, pruned, plan, ids, torch.float64, tolerance, modes)
    return report


def _compare(
    model: PreTrainedModel,
    pruned: PreTrainedModel,
    plan: PruningPlan,
    ids: torch.Tensor,
    dtype: torch.dtype,
    tolerance: float,
    modes: list[KeptNorms],
) -> EquivalenceReport:
    held, stored = sources(model), model.dtype
    tables = {n: b for n, b in pruned.named_buffers() if n not in held}  # computed anew, in a precision of their own

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name in tables and _rounded_off(tables[name], tensor, stored):
            return tables[name].to(tensor.device)
        return masked(name, tensor, plan) if name in plan.kept else tensor

    tokens = None if plan.tokens is None else torch.tensor(plan.tokens)
    with ExitStack() as stack:
        for mode in modes:
            stack.enter_context(mode)
        expected = _logits(model, ids if tokens is None else tokens[ids.cpu()], dtype, change)
    if tokens is not None and expected.shape[-1] > len(tokens):
        expected = expected[..., tokens]
    found = _logits(pruned, ids, dtype, lambda _, tensor: tensor)
    difference = (found - expected).abs().max().item()
    return EquivalenceReport(difference, relative_difference(found, expected), tolerance, dtype)


def _rounded_off(table: torch.Tensor, stored: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether a table computed anew is what a model of ``dtype`` has, but for rounding."""
    if table.shape != stored.shape or not (table.is_floating_point() and stored.is_floating_point()):
        return False
    fine = table.to(stored.device, torch.float64)
    close = 2 * torch.finfo(dtype).eps
    return torch.allclose(fine, stored.double(), rtol=close, atol=close, equal_nan=True)


@torch.no_grad()
def _logits(
    model: PreTrainedModel, ids: torch.Tensor, dtype: torch.dtype, change: Callable[[str, torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """The logits, on the CPU in float64, of a model whose tensors are changed and cast while they are used."""

    compute = replace(native(model), dtype=dtype)

    def stand_in(name: str, tensor: torch.Tensor) -> torch.Tensor:
        tensor = change(name, compute.convert(tensor))
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    with traceable(model), streamed(model, stand_in):
        return model(**model_inputs(model, ids.to(compute.device)), use_cache=False).logits.double().cpu()
