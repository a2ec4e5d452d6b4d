"""Compute the cost of a model from its shapes, multiply-accumulates and memory, without reading a weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from ..models.inputs import example_inputs, share_inputs
from ..models.running import MetaReads, forward, model_inputs, tracing_mode, without_cache
from ..models.skeleton import skeleton
from ..selection.budgets import BYTES, COUNTS, Budget
from ..selection.plan import PruningPlan
from ..surgery.apply import apply


@torch.no_grad()
def macs(model: PreTrainedModel, tokens: int = 128, batch: int = 1) -> int:
    """Count the multiply-accumulates of one forward pass over ``[batch, tokens]``, attention included.

    Of a mixture of experts only the experts that tokens are routed to count.
    """
    twin = _meta_twin(model).requires_grad_(False)
    try:
        return _count_macs(twin, tokens, batch)
    except RuntimeError:
        if model.device.type == "meta":
            raise
        return _count_macs(model, tokens, batch)  # some norms are decomposed on the CPU only


def _count_macs(model: PreTrainedModel, tokens: int, batch: int) -> int:
    with tracing_mode(model), FlopCounterMode(display=False) as counter, MetaReads():
        forward(model, example_inputs(model, batch, tokens))
    return int(counter.get_total_flops()) // 2


@torch.no_grad()
def memory(model: PreTrainedModel, tokens: int = 2048, batch: int = 1) -> int:
    """Count the bytes of the weights, in their own dtype, and of the cache that ``[batch, tokens]`` fills."""
    weights = sum(p.nbytes for p in model.parameters())
    twin = _meta_twin(model)
    if not without_cache(twin):
        return weights
    with tracing_mode(twin), MetaReads():
        inputs = model_inputs(twin, example_inputs(twin, batch, tokens))
        cache = twin(**inputs, use_cache=True).get("past_key_values")
    return weights + sum(t.nbytes for t in _tensors_in(cache))


def macs_budget(model: PreTrainedModel, target: float | str, tokens: int = 128, batch: int = 1) -> Budget:
    """Build a budget of multiply-accumulates: a fraction of the model's, or an amount such as ``"10G"``."""
    measure = _cost_of_plan(model, lambda m: macs(m, tokens, batch))
    return Budget("target_macs", target, measure, COUNTS, "multiply-accumulates")


def memory_budget(model: PreTrainedModel, target: float | str, tokens: int = 2048, batch: int = 1) -> Budget:
    """Build a budget of memory for weights and cache: a fraction of the model's, or an amount such as ``"6GiB"``."""
    measure = _cost_of_plan(model, lambda m: memory(m, tokens, batch))
    return Budget("target_memory", target, measure, BYTES, "bytes")


def _cost_of_plan(model: PreTrainedModel, cost: Callable[[PreTrainedModel], float]) -> Callable[[PruningPlan], float]:
    """Return a function from a plan to the cost of the model that the plan leaves."""
    twin = _meta_twin(model)
    return lambda plan: cost(apply(twin, plan) if plan.units else twin)


def _meta_twin(model: PreTrainedModel) -> PreTrainedModel:
    """Return the same model on the meta device."""
    if model.device.type == "meta":
        return model
    twin: Any = skeleton(type(model), model.config)
    share_inputs(twin, model)
    return twin.to(model.dtype).eval()


def _tensors_in(value: Any, visited: set[int] | None = None) -> list[torch.Tensor]:
    """Collect the tensors of a cache of any class, each once."""
    visited = set() if visited is None else visited
    if id(value) in visited:
        return []
    visited.add(id(value))
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        members = list(value)
    elif isinstance(value, type):
        members = []
    else:
        members = list((value if isinstance(value, dict) else getattr(value, "__dict__", {})).values())
    return [tensor for member in members for tensor in _tensors_in(member, visited)]
