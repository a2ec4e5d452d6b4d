"""Mask equivalence: compare a pruned model with the original whose removed slices are zeroed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import PrunerError
from ..graph.routers import router_slices
from ..graph.units import CouplingGraph, trace
from ..models.blockwise import native_compute, standing_in
from ..models.experts import Unrouted
from ..models.hooks import forward_hooks
from ..models.inputs import IDS, Inputs, ModelInputs, as_inputs, example_inputs
from ..models.layers import hidden_in, with_hidden
from ..models.per_layer import layer_lists
from ..models.running import (
    check_ids,
    equal_draws,
    forward,
    implementations,
    main_output,
    relative_difference,
    stored_tensors,
    tracing_mode,
)
from ..models.skeleton import shapes_of
from ..models.torch_internals import TorchDispatchMode
from ..selection.plan import PruningPlan
from .per_token import with_plan_routing
from .slicing import check_fits, mask

# Kinds of units whose removal is the same as zeros in their place, given norms and routers that know.
MASKABLE = {"hidden", "heads", "query_heads", "neurons", "experts", "layers", "vocabulary"}


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

    Both agree for units without flags; for hidden channels, for which norms are restricted to the kept channels; and
    for experts, which routers are kept from choosing (:class:`llm_pruner.models.experts.Unrouted`). Removed layers are
    masked too; where norms behind their sums forbid that, they are skipped. The logits differ in the order of sums,
    which a badly damaged model can amplify beyond any tolerance; where they differ, they are compared again in
    float64, one model at a time, which tells rounding from a mistake.

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
        PrunerError: the plan is for another model, or the pruned model cannot read ``tokens``.

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
    check_fits(shapes_of(model), plan)
    model = with_plan_routing(model, plan)
    ids = example_inputs(pruned, rows=2, tokens=16, seed=seed) if tokens is None else as_inputs(tokens)
    if not isinstance(ids, (torch.Tensor, ModelInputs)):
        raise PrunerError(f"tokens must be a LongTensor [rows, tokens] or inputs by name, not {type(ids).__name__}")
    if tokens is not None:
        check_ids(pruned, ids, "tokens")
    needs_modes = any(choice.kind in ("hidden", "experts") for choice in plan.units.values())
    modes = masking_modes(trace(model), plan) if needs_modes else Modes()
    compare = partial(compare_logits, model, pruned, plan, ids, tolerance=tolerance, modes=modes)
    report = _compare_finely(model, compare)
    if not report.equivalent and plan.layers:  # a norm behind a layer's sums does not pass on what is masked
        with _skipped_layers(model, plan):
            report = _compare_finely(model, compare)
    return report


def _compare_finely(model: PreTrainedModel, compare: Callable[..., EquivalenceReport]) -> EquivalenceReport:
    """Compare in the model's precision and, where that differs, in float64."""
    report = compare(dtype=native_compute(model).dtype)
    if not report.equivalent and model.dtype is not torch.float64:
        with suppress(RuntimeError, TypeError):  # some models insist on float32 somewhere, as Apple's GPUs do
            report = compare(dtype=torch.float64)
    return report


@contextmanager
def _skipped_layers(model: PreTrainedModel, plan: PruningPlan) -> Iterator[None]:
    """Let the layers that a plan drops pass on the hidden states that they are given."""

    def skip(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return with_hidden(output, hidden_in(args, kwargs))

    stacks = layer_lists(model)
    gone = [layer for path, kept in plan.layers.items() for i, layer in enumerate(stacks[path]) if i not in kept]
    with forward_hooks([(layer, skip) for layer in gone], with_kwargs=True):
        yield


def compare_logits(
    model: PreTrainedModel,
    pruned: PreTrainedModel,
    plan: PruningPlan,
    ids: Inputs,
    *,
    dtype: torch.dtype,
    tolerance: float,
    modes: Modes,
) -> EquivalenceReport:
    """Compare the logits of the pruned model with those of the masked original, both computed in ``dtype``.

    Args:
        ids: inputs of the pruned model.
        modes: modes that the masked original needs, from :func:`masking_modes`.
    """
    held, stored = stored_tensors(model), model.dtype
    tables = {n: b for n, b in pruned.named_buffers() if n not in held}  # computed anew, in a precision of their own

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name in tables and _rounded_off(tables[name], tensor, stored):
            return tables[name].to(tensor.device)
        return mask(name, tensor, plan) if name in plan.kept else tensor

    tokens = None if plan.tokens is None else torch.tensor(plan.tokens)
    with ExitStack() as stack:
        stack.enter_context(modes.routers)
        for mode in modes.norms:
            stack.enter_context(mode)
        inputs = ids if tokens is None else _original_ids(ids, tokens)
        expected = changed_logits(model, inputs, dtype, change, routers=modes.routers)
    actual = changed_logits(pruned, ids, dtype, lambda _, tensor: tensor)
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
    close = 2 * torch.finfo(dtype).eps
    return torch.allclose(table.cpu().double(), stored.cpu().double(), rtol=close, atol=close, equal_nan=True)


@torch.no_grad()
def changed_logits(
    model: PreTrainedModel,
    ids: Inputs,
    dtype: torch.dtype,
    change: Callable[[str, torch.Tensor], torch.Tensor],
    *,
    routers: Unrouted | None = None,
) -> torch.Tensor:
    """Return the logits, on the CPU in float64, of a model whose tensors are changed and cast while they are used."""

    compute = replace(native_compute(model), dtype=dtype)

    def stand_in(name: str, tensor: torch.Tensor) -> torch.Tensor:
        tensor = compute.convert(change(name, tensor))  # the copy that is masked is in the dtype of the files
        tensor = tensor.to(dtype) if tensor.is_floating_point() else tensor
        return tensor if routers is None else routers.stand_in(name, tensor)

    # A loop over experts reads their weights in place; batched experts copy them for every token.
    with tracing_mode(model), implementations(model, experts="eager"), standing_in(model, stand_in), equal_draws():
        return main_output(forward(model, ids.to(compute.device))).cpu().double()


AVERAGES = ("mean", "var", "std", "var_mean")
NORMS = {"native_layer_norm": 1, "_fused_rms_norm": 1}  # where normalized_shape is


class KeptNorms(TorchDispatchMode):
    """A mode in which averages and norms over the last dim leave out ``removed`` positions that are all the same.

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


@dataclass(frozen=True, kw_only=True)
class Modes:
    """Modes in which a model whose removed slices are zeroed computes what the pruned one does."""

    norms: list[KeptNorms] = field(default_factory=list)
    routers: Unrouted = field(default_factory=lambda: Unrouted({}))

    @contextmanager
    def routing(self, model: nn.Module) -> Iterator[None]:
        """Keep the routers of a model from choosing removed experts; do nothing where none is removed."""
        if not self.routers.removed:
            yield
            return
        with implementations(model, experts="batched_mm"), self.routers:
            yield


def masking_modes(graph: CouplingGraph, plan: PruningPlan) -> Modes:
    """Return the modes that a plan needs: one for every hidden unit that it cuts, and one for all experts."""
    norms: list[KeptNorms] = []
    removed: dict[str, dict[int, torch.Tensor]] = {}
    for unit in graph.of_kind("hidden", "experts"):
        if unit.name not in plan.units:
            continue
        if unit.kind == "experts":
            removed |= router_slices(unit, set(range(unit.size)) - set(plan.units[unit.name].kept.tolist()))
        else:
            (name, dim), label = next((key, label) for key, label in unit.dims.items() if int((label >= 0).all()))
            norms.append(KeptNorms(plan.kept[name][dim], len(label)))
    return Modes(norms=norms, routers=Unrouted(removed))
