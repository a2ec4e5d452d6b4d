"""Mask equivalence: compare a pruned model with the original whose removed slices are zeroed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from ..graph.units import CouplingGraph, trace
from ..models.blockwise import native_compute, standing_in
from ..models.inputs import IDS, Inputs, ModelInputs, as_inputs, example_inputs
from ..models.running import (
    equal_draws,
    forward,
    main_output,
    relative_difference,
    stored_tensors,
    tracing_mode,
)
from ..selection.plan import PruningPlan
from .slicing import check_fits, mask

# Kinds of units whose removal is the same as zeros in their place, if norms average over the kept channels only.
MASKABLE = {"hidden", "heads", "query_heads", "neurons", "layers", "vocabulary"}


@dataclass
class EquivalenceReport:
    """Outcome of :func:`verify`.

    Attributes:
        max_abs_diff: largest absolute difference of two logits.
        relative: ``max_abs_diff`` over the largest absolute logit.
        tolerance: largest ``relative`` that counts as equivalent.
        precision: dtype of the comparison.
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
    tokens: torch.Tensor | Mapping[str, torch.Tensor] | None = None,
    *,
    seed: int = 0,
    tolerance: float = 1e-5,
) -> EquivalenceReport:
    """Compare the logits of the pruned model with those of the original with the removed slices zeroed.

    Both agree (mask equivalence) for units without flags, and for hidden channels, for which norms are restricted to
    the kept channels. Sums in another order cause rounding, which a badly damaged model can amplify beyond any
    tolerance. If the logits differ, they are therefore compared again in float64, one model at a time.

    Args:
        model: original model, with weights.
        pruned: model that ``plan`` left of it, before any refit.
        plan: plan that made ``pruned``.
        tokens: LongTensor ``[rows, tokens]`` of the pruned model's token ids, or inputs by name, as a processor returns
            them (default: random ones). Where the plan cuts the vocabulary, the original reads the same tokens by its
            own ids.
        seed: seed of the random inputs.
        tolerance: largest difference, relative to the largest absolute logit, that still counts as equivalent.

    Returns:
        The differences, and ``equivalent``: True if they are within the tolerance.

    Raises:
        PrunerError: the plan is for another model.

    Example:
        >>> import llm_pruner as lp
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        ...                      num_attention_heads=2)
        >>> model = LlamaForCausalLM(config).eval()
        >>> graph = lp.trace(model)
        >>> plan = lp.select(graph, lp.score(model, graph, criterion="l2"), ratio=0.25, kinds=("neurons",))
        >>> lp.verify(model, lp.apply(model, plan), plan).equivalent
        True
    """
    check_fits({name: tuple(t.shape) for name, t in stored_tensors(model).items()}, plan)
    ids = example_inputs(pruned, rows=2, tokens=16, seed=seed) if tokens is None else as_inputs(tokens)
    hidden = any(choice.kind == "hidden" for choice in plan.units.values())
    modes = norm_modes(trace(model), plan) if hidden else []
    report = _compare(model, pruned, plan, ids, native_compute(model).dtype, tolerance, modes)
    if not report.equivalent and model.dtype is not torch.float64:
        with suppress(RuntimeError):  # some models insist on float32 somewhere
            report = _compare(model, pruned, plan, ids, torch.float64, tolerance, modes)
    return report


def _compare(
    model: PreTrainedModel,
    pruned: PreTrainedModel,
    plan: PruningPlan,
    ids: Inputs,
    dtype: torch.dtype,
    tolerance: float,
    modes: list[KeptNorms],
) -> EquivalenceReport:
    held, stored = stored_tensors(model), model.dtype
    tables = {n: b for n, b in pruned.named_buffers() if n not in held}  # computed anew, in a precision of their own

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name in tables and _rounded_off(tables[name], tensor, stored):
            return tables[name].to(tensor.device)
        return mask(name, tensor, plan) if name in plan.kept else tensor

    tokens = None if plan.tokens is None else torch.tensor(plan.tokens)
    with ExitStack() as stack:
        for mode in modes:
            stack.enter_context(mode)
        expected = _changed_logits(model, ids if tokens is None else _original_ids(ids, tokens), dtype, change)
    actual = _changed_logits(pruned, ids, dtype, lambda _, tensor: tensor)
    if tokens is not None and expected.shape[-1] > actual.shape[-1]:
        expected = expected[..., tokens]
    difference = (actual - expected).abs().max().item()
    return EquivalenceReport(difference, relative_difference(actual, expected), tolerance, dtype)


def _original_ids(ids: Inputs, tokens: torch.Tensor) -> Inputs:
    """Return the same inputs with the original's token ids, ``tokens`` by those of the pruned model."""
    if isinstance(ids, torch.Tensor):
        return tokens[ids.cpu()]
    named = ids.tensors()
    return ModelInputs({name: tokens[value.cpu()] if name in IDS else value for name, value in named.items()})


def _rounded_off(table: torch.Tensor, stored: torch.Tensor, dtype: torch.dtype) -> bool:
    """Return True if a table computed anew is what a model of ``dtype`` has, but for rounding."""
    if table.shape != stored.shape or not (table.is_floating_point() and stored.is_floating_point()):
        return False
    fine = table.to(stored.device, torch.float64)
    close = 2 * torch.finfo(dtype).eps
    return torch.allclose(fine, stored.double(), rtol=close, atol=close, equal_nan=True)


@torch.no_grad()
def _changed_logits(
    model: PreTrainedModel, ids: Inputs, dtype: torch.dtype, change: Callable[[str, torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Return the logits, on the CPU in float64, of a model whose tensors are changed and cast while they are used."""

    compute = replace(native_compute(model), dtype=dtype)

    def stand_in(name: str, tensor: torch.Tensor) -> torch.Tensor:
        tensor = change(name, compute.convert(tensor))
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    with tracing_mode(model), standing_in(model, stand_in), equal_draws():
        return main_output(forward(model, ids.to(compute.device))).double().cpu()


AVERAGES = ("mean", "var", "std", "var_mean")
NORMS = {"native_layer_norm": 1, "_fused_rms_norm": 1}  # where normalized_shape is


class KeptNorms(TorchDispatchMode):
    """Averages and norms over the last dim leave out the ``removed`` positions, where these are all the same.

    The dim may hold the hidden axis several times over, as that of several residual streams does.
    """

    def __init__(self, kept: torch.Tensor, size: int):
        super().__init__()
        is_removed = torch.ones(size, dtype=torch.bool)
        is_removed[kept] = False
        self.kept, self.removed, self.size = kept, is_removed.nonzero().flatten(), size

    def concerns(self, x: Any) -> bool:
        return isinstance(x, torch.Tensor) and x.ndim > 0 and x.shape[-1] % self.size == 0 and x.is_floating_point()

    def pick(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, self.size)).index_select(-1, positions.to(x.device)).flatten(-2)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if not (name in AVERAGES or name in NORMS) or not self.concerns(args[0]):
            return func(*args, **kwargs)
        x = args[0]
        values = self.pick(x, self.removed)
        if (values != values[..., :1]).any():  # zeros, or zeros from which a mean has been subtracted
            return func(*args, **kwargs)
        args = [self.pick(a, self.kept) if self.concerns(a) else a for a in args]
        if name in AVERAGES:
            over = args[1] if len(args) > 1 else kwargs.get("dim")
            last = isinstance(over, (list, tuple)) and [d % x.ndim for d in over] == [x.ndim - 1]
            return func(*args, **kwargs) if last else func(x, *args[1:], **kwargs)
        args[NORMS[name]] = [args[0].shape[-1]]
        out, *statistics = func(*args, **kwargs)
        whole = torch.zeros_like(x, dtype=out.dtype).unflatten(-1, (-1, self.size))
        whole.index_copy_(-1, self.kept.to(x.device), out.unflatten(-1, (-1, len(self.kept))))
        return (whole.flatten(-2), *statistics)


def norm_modes(graph: CouplingGraph, plan: PruningPlan) -> list[KeptNorms]:
    """Return the modes that a plan needs: one for every hidden unit that it cuts."""
    modes = []
    for unit in graph.of_kind("hidden"):
        if unit.name in plan.units:
            (name, dim), label = next((key, label) for key, label in unit.dims.items() if int((label >= 0).all()))
            modes.append(KeptNorms(plan.kept[name][dim], len(label)))
    return modes
