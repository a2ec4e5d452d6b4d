"""What a model costs, told from its shapes: multiply-accumulates and memory. No weight is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from ..models.running import MetaReads, model_inputs, tracing_mode
from ..models.skeleton import skeleton
from ..selection.budgets import BYTES, COUNTS, Budget
from ..selection.plan import PruningPlan
from ..surgery.apply import apply


@torch.no_grad()
def macs(model: PreTrainedModel, tokens: int = 128, batch: int = 1) -> int:
    """Multiply-accumulates of one forward pass over ``[batch, tokens]``, those of attention included.

    Of a mixture of experts, those of the experts that tokens are sent to.
    """
    twin = _on_meta(model)
    with tracing_mode(twin), FlopCounterMode(display=False) as counter, MetaReads():
        twin(**model_inputs(twin, _ids(batch, tokens)), use_cache=False)
    return int(counter.get_total_flops()) // 2


@torch.no_grad()
def memory(model: PreTrainedModel, tokens: int = 2048, batch: int = 1) -> int:
    """Bytes of the weights, in their own precision, and of the cache that ``[batch, tokens]`` fill."""
    twin = _on_meta(model)
    with tracing_mode(twin), MetaReads():
        cache = twin(**model_inputs(twin, _ids(batch, tokens)), use_cache=True).get("past_key_values")
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return weights + sum(t.numel() * t.element_size() for t in _tensors(cache))


def macs_budget(model: PreTrainedModel, target: float | str, tokens: int = 128, batch: int = 1) -> Budget:
    """At most so many multiply-accumulates: a fraction, or an amount such as ``"10G"``."""
    measure = _of_plan(model, lambda m: macs(m, tokens, batch))
    return Budget("target_macs", target, measure, COUNTS, "multiply-accumulates")


def memory_budget(model: PreTrainedModel, target: float | str, tokens: int = 2048, batch: int = 1) -> Budget:
    """At most so much memory for weights and cache: a fraction, or an amount such as ``"6GiB"``."""
    return Budget("target_memory", target, _of_plan(model, lambda m: memory(m, tokens, batch)), BYTES, "bytes")


def _of_plan(model: PreTrainedModel, cost: Callable[[PreTrainedModel], float]) -> Callable[[PruningPlan], float]:
    twin = _on_meta(model)
    return lambda plan: cost(apply(twin, plan) if plan.units else twin)


def _on_meta(model: PreTrainedModel) -> PreTrainedModel:
    if model.device.type == "meta":
        return model
    twin: Any = skeleton(type(model), model.config)
    return twin.to(model.dtype).eval()


def _ids(batch: int, tokens: int) -> torch.Tensor:
    return torch.ones(batch, tokens, dtype=torch.long, device="meta")


def _tensors(value: Any, seen: set[int] | None = None) -> list[torch.Tensor]:
    """Every tensor in a cache, however it is built."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return []
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        inside = list(value.values())
    elif isinstance(value, (list, tuple)):
        inside = list(value)
    else:
        inside = list(vars(value).values()) if hasattr(value, "__dict__") and not isinstance(value, type) else []
    return [t for item in inside for t in _tensors(item, seen)]
