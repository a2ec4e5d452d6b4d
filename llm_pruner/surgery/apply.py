"""Carrying out a plan: slice the weights, rebuild the model from a config, prove that both agree."""

from __future__ import annotations

import copy
from collections import defaultdict
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from ..errors import PrunerError
from ..graph import CouplingGraph, TraceError, sources, trace, traceable
from ..graph.verify import logits, random_tokens, relative_difference
from ..selection import PruningPlan
from . import config_solver
from .slicing import check_fits, cut, masked, renamed


def apply(model: PreTrainedModel, plan: PruningPlan) -> PreTrainedModel:
    """A new, smaller model of the same class; the original is untouched.

    The new model is built from a config, so that every attribute is right by construction, and traced: its
    units must be the original's at the sizes that the plan says. Weights keep dtype and device.

    Raises:
        PrunerError: the plan is for another model, or no config expresses what it leaves.
    """
    check_fits({name: tuple(t.shape) for name, t in sources(model).items()}, plan)
    graph = trace(model)
    known = {unit.name for unit in [*graph.units, *graph.frozen]}
    unknown = [name for name in plan.units if name not in known]
    if unknown:
        raise PrunerError(f"the plan was made for another model: it has no unit {unknown[0]}")
    problem = ""
    for config in config_solver.solve(model, plan, graph):
        problem = _wrong_axis(type(model), config, graph, plan)
        if not problem:
            return _fill(model, plan, config)
    raise PrunerError(f"no config of {type(model.config).__name__} carries the plan: {problem}")


def _wrong_axis(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, original: CouplingGraph, plan: PruningPlan
) -> str:
    """What a rebuilt model has otherwise than the plan says; shapes can agree while head counts do not."""
    try:
        graph = trace(config_solver.skeleton(model_class, config))
    except TraceError as error:
        return str(error)
    expected = _axes(original, plan)
    for key, sizes in _axes(graph, PruningPlan()).items():
        if sizes != expected[key]:
            return f"{key[0]} has axes {sizes} in dim {key[1]} of the rebuilt model instead of {expected[key]}"
    return ""


def _axes(graph: CouplingGraph, plan: PruningPlan) -> dict[tuple[str, int], list[int]]:
    """The sizes of the axes that every parameter dim is made of, after the plan."""
    out: dict[tuple[str, int], list[int]] = defaultdict(list)
    for unit in [*graph.units, *graph.frozen]:
        if unit.kind == "layers":
            continue
        size = plan.units[unit.name].kept.numel() if unit.name in plan.units else unit.size
        for name, dim in unit.dims:
            new = renamed(name, plan)
            if new is not None and size > 1:  # an axis of one index is no axis any more
                out[new, dim].append(size)
    return defaultdict(list, {key: sorted(sizes) for key, sizes in out.items()})


def _fill(model: PreTrainedModel, plan: PruningPlan, config: PreTrainedConfig) -> PreTrainedModel:
    first_name: dict[int, str] = {}  # tied tensors are cut once, under the name that the plan knows
    names = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    canonical = {name: first_name.setdefault(id(tensor), name) for name, tensor in names}
    tensors = dict(names)
    done: dict[str, torch.Tensor] = {}
    state = {}
    for name in model.state_dict():
        new = renamed(name, plan)
        if new is not None:
            key = canonical[name]
            if key not in done:
                done[key] = cut(key, tensors[name].detach(), plan)
            state[new] = done[key]
    with no_init_weights():
        pruned = type(model)._from_config(
            config, dtype=model.dtype, attn_implementation=model.config._attn_implementation
        )
    pruned.load_state_dict(state, strict=True, assign=True)
    pruned.tie_weights()
    if model.can_generate():
        pruned.generation_config = copy.deepcopy(model.generation_config)
    for module in pruned.modules():  # buffers that no checkpoint holds stay as constructed, as after a reload
        for key, buffer in module.named_buffers(recurse=False):
            setattr(module, key, buffer.to(model.device))
    return pruned.train(model.training)


@dataclass
class EquivalenceReport:
    """Outcome of :func:`verify`.

    Attributes:
        max_abs_diff: largest absolute difference of two logits.
        relative: the same over the largest absolute logit.
        tolerance: what ``relative`` may be at most.
    """

    max_abs_diff: float
    relative: float
    tolerance: float

    @property
    def equivalent(self) -> bool:
        return self.relative <= self.tolerance


@torch.no_grad()
def verify(
    model: PreTrainedModel,
    pruned: PreTrainedModel,
    plan: PruningPlan,
    tokens: torch.Tensor | None = None,
    seed: int = 0,
) -> EquivalenceReport:
    """Mask equivalence: do the pruned model's logits equal the original's with the removed slices zeroed?

    Holds for units without the ``norm`` flag. The tolerance is 1e-5 relative in fp32, and three units in the
    last place of a 16-bit dtype. Works on random tokens unless ``tokens`` (LongTensor ``[rows, tokens]``) are given.
    """
    ids = random_tokens(pruned, rows=2, tokens=16, seed=seed) if tokens is None else tokens
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    zeroed = {name: masked(name, tensors[name].detach(), plan) for name in plan.kept}
    ids = ids.to(model.device)
    with traceable(model), traceable(pruned), _swapped(model, zeroed):
        expected = logits(model, ids)
        found = logits(pruned, ids.to(pruned.device)).to(expected.device)
    tolerance = 1e-5 if model.dtype in (torch.float32, torch.float64) else 3 * torch.finfo(model.dtype).eps
    if any(choice.kind == "vocabulary" for choice in plan.units.values()):
        raise PrunerError("mask equivalence is not defined for a plan that cuts the vocabulary: token ids move")
    return EquivalenceReport((found - expected).abs().max().item(), relative_difference(found, expected), tolerance)


class _swapped:
    """Other values in a model's own parameters for the length of a block (tied names follow)."""

    def __init__(self, model: torch.nn.Module, values: dict[str, torch.Tensor]):
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        self.pairs = [(tensors[name], value) for name, value in values.items()]

    def __enter__(self) -> None:
        self.swap()

    def __exit__(self, *_: object) -> None:
        self.swap()

    def swap(self) -> None:
        self.pairs = [(tensor, self._exchange(tensor, value)) for tensor, value in self.pairs]

    @staticmethod
    def _exchange(tensor: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        old = tensor.data
        tensor.data = value
        return old
