"""Score units with importance classes of torch-pruning (DepGraph, arXiv 2301.12900).

A unit becomes a group of torch-pruning. The members of the group are stand-ins for the model's modules, with the same
weights and, for criteria that read gradients, those of the calibration loss; the model itself is not touched. Every
member has one entry per *root channel*: ``unit.size * width`` of them, ordered by index. A dim with more channels per
index (the query heads of a key-value group) becomes several members, which torch-pruning's ``group_reduction``
combines. The root channels of one index are summed.

GroupMagnitudeImportance(p, group_reduction="sum", normalizer=None)   sum |w|^p          = l1, l2
GroupTaylorImportance(group_reduction="sum", normalizer=None)         sum |w g|          = taylor, param_first
    multivariable=True                                                | sum w g |        = taylor, vectorize
GroupHessianImportance(group_reduction="sum", normalizer=None)        sum w^2 mean g^2   = taylor, param_second
OBDCImportance                                                        sum w^2 mean g^2, of rows only
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import PrunerError
from ..graph.units import Unit
from .aggregate import scored_dims
from .gradients import visit_gradients, visit_moments
from .request import Request

Gradients = dict[str, torch.Tensor]  # by parameter name, in fp32


def is_torch_pruning(criterion: Any) -> bool:
    """Return True for an instance, or subclass, of torch-pruning's ``Importance``; does not import torch-pruning."""
    kind = criterion if isinstance(criterion, type) else type(criterion)
    return any(
        (base.__module__, base.__name__) == ("torch_pruning.pruner.importance", "Importance") for base in kind.__mro__
    )


def score_groups(importance: Any, request: Request) -> dict[str, torch.Tensor]:
    """Score units with an importance of torch-pruning.

    Args:
        importance: callable that maps a ``torch_pruning.Group`` to a tensor ``[root channels]``.

    Returns ``{unit.name: [unit.size]}``, without units that torch-pruning's groups cannot express and units for which
    the importance returns None (no module is of its ``target_types``).

    Raises:
        PrunerError: the importance needs gradients and there is no calibration set, or it returns another number of
            channels.
    """
    units = [unit for unit in request.units if unit.kind not in ("layers", "vocabulary")]
    builder = _GroupBuilder(request=request, gradients=_gradients(importance, units, request))
    scores = {}
    with torch.random.fork_rng(devices=[]):  # RandomImportance draws from the global generator
        torch.manual_seed(request.seed)
        for unit in units:
            group, width = builder.build(unit)
            if len(group) and (channels := _call(importance, group)) is not None:
                if tuple(channels.shape) != (unit.size * width,):
                    raise PrunerError(
                        f"{type(importance).__name__} returned {list(channels.shape)} for unit {unit.name}: return one "
                        f"number for each of its {unit.size * width} channels"
                    )
                scores[unit.name] = channels.detach().cpu().double().view(unit.size, width).sum(1)
    return scores


def _gradients(importance: Any, units: Iterable[Unit], request: Request) -> Gradients:
    """Return the tensors for ``parameter.grad``: g, or (1/N) sum_n g_n^2 for Hessians; none for classes that read none.

    Classes of users get g if there is a calibration set.
    """
    from torch_pruning.pruner import importance as classes

    squared = isinstance(importance, (classes.GroupHessianImportance, classes.OBDCImportance))
    own = type(importance).__module__ != classes.__name__
    if not (
        squared or isinstance(importance, classes.GroupTaylorImportance) or (own and request.calibration is not None)
    ):
        return {}
    ids = request.tokens
    parameters = {name for name, _ in request.model.named_parameters()}
    names = parameters & {name for unit in units for name in unit.parameters}
    gradients: Gradients = {}

    if squared:
        visit_moments(
            request.model, names, ids, lambda n, _, m: gradients.update({n: m.square}), compute=request.compute
        )
    else:
        visit_gradients(request.model, names, ids, lambda n, _, g: gradients.update({n: g}), compute=request.compute)
    return gradients


def _call(importance: Any, group: Any) -> torch.Tensor | None:
    """Call an importance on a group; a class that gathers second derivatives in passes of its own is given them."""
    from torch_pruning.pruner import importance as classes

    if isinstance(importance, classes.GroupHessianImportance):
        importance = copy.copy(importance)
        importance._accu_grad = {}  # weight.grad holds the Hessian already
    elif isinstance(importance, classes.OBDCImportance):
        importance = copy.copy(importance)
        importance.steps, importance.num_classes = 1, None  # a layer of num_classes outputs would be skipped
        group = _rows_only(group)
        importance.Fisher = {d.target.module: d.target.module.weight.grad for d, _ in group.items}
    return importance(group)


def _rows_only(group: Any) -> Any:
    """Return the members that are rows of linear layers, each as a layer of these rows alone.

    OBDCImportance (1.6.1) multiplies the chosen rows with the Fisher matrix of all rows.
    """
    from torch_pruning import Dependency, Group, function

    rows_group = Group()
    for item in group.items:
        dependency, rows = item
        if dependency.handler == function.prune_linear_out_channels:
            whole = dependency.target.module
            layer = nn.Linear(whole.in_features, len(rows), bias=False, device="meta")
            layer.weight = nn.Parameter(whole.weight.data[rows])
            layer.weight.grad = whole.weight.grad[rows]
            node = copy.copy(dependency.target)
            node.module = layer
            rows_group.add_dep(
                Dependency(dependency.trigger, dependency.handler, dependency.source, node), [*range(len(rows))]
            )
            rows_group[-1].root_idxs = item.root_idxs
    return rows_group


@dataclass(kw_only=True)
class _GroupBuilder:
    """Builds torch-pruning's group of a unit from stand-ins."""

    request: Request
    gradients: Gradients
    ranks: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        self.ranks = {name: parameter.ndim for name, parameter in self.request.model.named_parameters()}

    def build(self, unit: Unit) -> tuple[Any, int]:
        """Return the group of a unit, empty if no parameter is scored, and its root channels per index."""
        from torch_pruning import Dependency, Group
        from torch_pruning.dependency import Node

        dims = [(name, dim, unit.positions(name, dim)) for name, dim in scored_dims(unit, self.ranks)]
        widths = [positions.shape[1] for _, _, positions in dims] or [1]
        width = min(widths) if all(w % min(widths) == 0 for w in widths) else 1
        stand_ins = {path: self._stand_in(path) for path in dict.fromkeys(_path(name) for name, _, _ in dims)}
        group, root, members = Group(), None, set()
        for name, dim, positions in dims:
            target, handler, axis = _operation(
                self.request.model.get_submodule(_path(name)), stand_ins[_path(name)], name, dim
            )
            if (target, handler) in members:  # weight and bias of a norm are one member
                continue
            members.add((target, handler))
            node = Node(target, None, name)
            node.pruning_dim = axis
            root = root or (node, handler)
            for part in positions.view(unit.size, -1, width).unbind(1):
                _add_member(group, Dependency(root[1], handler, root[0], node), part.flatten())
        return group, width

    def _stand_in(self, path: str) -> nn.Module:
        """Return a copy of a module with parameters of its own, in fp32; an ``nn.Linear`` for a ``Conv1D``."""
        module = self.request.model.get_submodule(path)
        parameters: dict[str, Any] = {
            key: None if tensor is None else self._parameter(f"{path}.{key}".lstrip("."), tensor)
            for key, tensor in module._parameters.items()
        }
        if isinstance(module, Conv1D):
            inputs, outputs = module.weight.shape
            clone: nn.Module = nn.Linear(inputs, outputs, device="meta")
            weight = parameters["weight"]
            parameters["weight"] = nn.Parameter(weight.data.T)
            parameters["weight"].grad = None if weight.grad is None else weight.grad.T
        else:
            clone = copy.copy(module)
        clone._parameters = parameters
        return clone

    def _parameter(self, name: str, tensor: torch.Tensor) -> nn.Parameter:
        parameter = nn.Parameter(self.request.compute.convert(tensor).float())
        if name in self.gradients:
            parameter.grad = self.gradients[name].to(parameter.device)
        return parameter


def _path(name: str) -> str:
    return name.rpartition(".")[0]


def _add_member(group: Any, dependency: Any, positions: torch.Tensor) -> None:
    """Add a member that reads a position for each root channel; in ascending order, since some classes sort."""
    order = positions.argsort()
    group.add_dep(dependency, positions[order].tolist())
    group[-1].root_idxs = order.tolist()


def _operation(module: nn.Module, stand_in: nn.Module, name: str, dim: int) -> tuple[Any, Any, int]:
    """Return torch-pruning's view of a parameter dim: module or parameter, pruning function, and dim.

    Parameters of modules that it does not know (RMSNorm, stacked experts) are members of their own, as in its graphs.
    """
    from torch_pruning import function as functions

    key = name.rpartition(".")[2]
    if key == "weight" and isinstance(module, (nn.Linear, Conv1D)):
        is_output = dim == (1 if isinstance(module, Conv1D) else 0)
        linear = functions.prune_linear_out_channels if is_output else functions.prune_linear_in_channels
        return stand_in, linear, 0 if is_output else 1
    if key == "weight" and isinstance(module, nn.Embedding) and dim == 1:
        return stand_in, functions.prune_embedding_out_channels, dim
    if isinstance(module, nn.modules.conv._ConvNd) and key == "weight" and module.groups == 1 and dim < 2:
        conv = functions.prune_conv_in_channels if dim else functions.prune_conv_out_channels
        return stand_in, conv, dim
    if isinstance(module, nn.LayerNorm):
        return stand_in, functions.prune_layernorm_out_channels, dim
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return stand_in, functions.prune_batchnorm_out_channels, dim
    return stand_in._parameters[key], functions.prune_parameter_out_channels, dim
