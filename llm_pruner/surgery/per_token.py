"""Send tokens to fewer experts: find the field of the config that says to how many, and change it.

No field is known by name. A router takes the top k of its scores, so an integer field of value k is the one if another
value changes that k in the operators that run, and nothing else.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import PrunerError
from ..graph.units import CouplingGraph, Unit, trace
from ..models.constructors import fields_of, refusal
from ..models.inputs import example_inputs, share_inputs
from ..models.per_layer import set_field
from ..models.running import ROUTER_LOSS, MetaReads, forward, tracing_mode
from ..models.skeleton import Shapes, shapes_of, skeleton
from ..selection.plan import PruningPlan
from .rebuild import build_from_state

EXPERTS_PER_TOKEN = "experts_per_token"  # setting of plans that change it
Choice = tuple[int, int]  # k, and of how many


class _TopK(MetaReads):
    """A mode that records every top-k."""

    def __init__(self) -> None:
        super().__init__()
        self.choices: list[Choice] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ == "topk":
            values, k, *dim = args
            self.choices.append((k, values.shape[dim[0] if dim else (kwargs or {}).get("dim", -1)]))
        return super().__torch_dispatch__(func, types, args, kwargs)


@torch.no_grad()
def _choices(model: PreTrainedModel, config: PreTrainedConfig) -> tuple[list[Choice], Shapes]:
    """Return every top-k of a model built from a config, in order, and the shapes of its tensors."""
    built = skeleton(type(model), config)
    share_inputs(built, model)
    with tracing_mode(built), _TopK() as mode:
        forward(built, example_inputs(built))
    return mode.choices, shapes_of(built)


def with_experts_per_token(model: PreTrainedModel, k: int) -> PreTrainedModel:
    """Return the model, on the same weights, with routers that send a token to ``k`` experts; itself if they do.

    Raises:
        PrunerError: the model has no routers, ``k`` is more than they choose now, or no field of the config says how
            many they choose.
    """
    flag, name = f"--experts_per_token {k}", type(model).__name__
    choices, of_experts, shapes = _routing(model, flag)
    now, of = choices[of_experts[0]]
    if not 1 <= k <= now:
        raise PrunerError(f"{flag} is out of range: {name} sends a token to {now} experts; give 1 to {now}")
    if k == now:
        return model
    expected = [(k, of) if i in of_experts else choice for i, choice in enumerate(choices)]
    config = next((c for c in _changed_configs(model.config, now, k) if _fits(model, c, expected, shapes)), None)
    if config is None:
        config_class = type(model.config).__name__
        raise PrunerError(f"{flag}: no field of {config_class} changes how many experts a token is sent to")
    routed = build_from_state(config, model.state_dict(), model)
    share_inputs(routed, model)
    return routed


def with_plan_routing(model: PreTrainedModel, plan: PruningPlan) -> PreTrainedModel:
    """Return the model with as many experts per token as a plan says; itself for plans that leave them.

    Raises:
        PrunerError: as :func:`with_experts_per_token`.
    """
    k = plan.settings.get(EXPERTS_PER_TOKEN)
    return with_experts_per_token(model, k) if isinstance(k, int) else model


def experts_per_token(model: PreTrainedModel) -> int:
    """Return how many experts a token is sent to.

    Raises:
        PrunerError: the model has no routers, or routers that choose different numbers.
    """
    choices, of_experts, _ = _routing(model, "--experts_per_token")
    return choices[of_experts[0]][0]


def without_balancing_loss(config: PreTrainedConfig, plan: PruningPlan, graph: CouplingGraph) -> PreTrainedConfig:
    """Return the config without the auxiliary loss of routers, if a plan leaves layers with different experts.

    The loss of transformers takes one number of experts for all layers, and fails in any forward pass.
    """
    sizes = {unit.name: unit.size for unit in graph.of_kind("experts")}
    sizes |= {name: choice.kept.numel() for name, choice in plan.units.items() if name in sizes}
    if len(set(sizes.values())) < 2:
        return config
    config = copy.deepcopy(config)
    for part in (config, config.get_text_config()):
        if getattr(part, ROUTER_LOSS, False):
            setattr(part, ROUTER_LOSS, False)
    return config


def _routing(model: PreTrainedModel, flag: str) -> tuple[list[Choice], list[int], Shapes]:
    """Return every top-k of a model, the positions of those that choose experts, and the shapes of its tensors.

    Args:
        flag: flag and value, for messages.

    Raises:
        PrunerError: no router chooses experts, or routers choose different numbers.
    """
    name = type(model).__name__
    units = trace(model).of_kind("experts")
    if not units:
        raise PrunerError(f"{flag}: {name} has no experts that a router chooses: leave the flag out")
    choices, shapes = _choices(model, model.config)
    of_experts = _of_experts(choices, units)
    if len({choices[i] for i in of_experts}) != 1:
        how = "takes other numbers of them in other layers" if of_experts else "takes the largest score alone"
        raise PrunerError(f"{flag}: the router of {name} {how}, which no config changes: leave the flag out")
    return choices, of_experts, shapes


def _changed_configs(config: PreTrainedConfig, now: int, k: int) -> Iterator[PreTrainedConfig]:
    """Yield the valid configs in which one field of value ``now`` is ``k``."""
    for field, value in fields_of(config).items():
        if type(value) is int and value == now:
            changed = copy.deepcopy(config)
            set_field(changed, field, k)
            if not refusal(changed):
                yield changed


def _of_experts(choices: list[Choice], units: list[Unit]) -> list[int]:
    """Return the positions of the choices of experts: in every layer the last of as many as a layer has experts.

    A router of groups looks for the best of each group before, and one group may be all.
    """
    sizes = {unit.size for unit in units}
    found = [i for i, (_, of) in enumerate(choices) if of in sizes]
    per_layer = len(found) // len(units)
    return found[per_layer - 1 :: per_layer] if per_layer and len(found) % len(units) == 0 else []


def _fits(model: PreTrainedModel, config: PreTrainedConfig, expected: list[Choice], shapes: Shapes) -> bool:
    """Return True if a model of a config makes the expected choices and has the same shapes."""
    try:
        return _choices(model, config) == (expected, shapes)
    except Exception:  # a field may be anything, and a model may refuse it in any way it likes
        return False
