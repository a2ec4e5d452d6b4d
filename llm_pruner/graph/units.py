"""Turn axes into units: name them, find their kinds, and record which positions of each weight belong to an index."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from math import lcm, prod
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ..display import Cells, amount, html_table, percent, plot_shares
from ..models.inputs import check_inputs, remembering
from ..models.layers import LayerLocator
from ..models.per_layer import Constant, layer_lists
from ..models.skeleton import shapes_of
from .axes import Atom, Dim, labels, leaves, size_of
from .constants import COMBINED, by_leaf
from .fingerprint import fingerprint
from .kinds import FIXED, Occurrence, fixed_heads, kind_of
from .limits import hidden_multiple, judge_by_twins
from .places import Part, by_layer, common_path
from .routing import fewest, groups_of, join_groups
from .tracer import TraceError, run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KINDS = ("heads", "query_heads", "neurons", "experts", "hidden", "channels", "layers", "vocabulary")
Slices = dict[str, dict[int, torch.Tensor]]


@dataclass(eq=False)
class Unit:
    """One axis of a model, such as the neurons of an MLP. An index, such as one neuron, is removed as a whole.

    Attributes:
        name: unique name in the graph, such as ``model.layers.3.mlp.neurons``.
        kind: one of :data:`KINDS`.
        layer: index of the layer it lies in, in its own stack, None where it spans several.
        size: how many indices it has.
        flags: why removing indices is not the same as zeroing them: ``norm`` where something normalises, averages
            or ranks over the axis, ``scale`` where attention scores are divided by a root of its size.
        frozen: why it must not be pruned, None where it may be.
        minimum: the fewest indices it can keep (experts: as many as a token is sent to).
        multiple: what the number of kept indices must be a multiple of (8 inside stacked experts, whose kernels want
            rows of 16 bytes, and in the shared experts beside them; a hidden size that attention heads must divide).
        groups: number of equal groups, of consecutive indices, in each of which as many must stay.
        block: number of consecutive indices that go together, as they share a scale of quantized weights.
        dims: index of the unit at every position of the parameter dims that it runs through, ``{(parameter name, dim):
            LongTensor [size of the dim]}``, -1 at positions of no index.
        constants: what every call of a layer is given of it, beside weights: ALiBi slopes.
        idle: True if the output does not depend on it, as on the last layers of a vision tower that is read before
            its end; it can be pruned where a module of the same class elsewhere, of which it is a copy, can.
    """

    name: str
    kind: str
    layer: int | None
    size: int
    flags: frozenset[str] = frozenset()
    frozen: str | None = None
    minimum: int = 1
    multiple: int = 1
    groups: int = 1
    block: int = 1
    dims: dict[tuple[str, int], torch.Tensor] = field(default_factory=dict, repr=False)
    constants: list[Constant] = field(default_factory=list, repr=False)
    idle: bool = False

    @property
    def parameters(self) -> list[str]:
        """Names of the parameters that the unit runs through, in the model's order."""
        return list(dict.fromkeys(name for name, _ in self.dims))

    @property
    def width(self) -> int:
        """Channels per index: 1 for a neuron, head_dim for a head (that of its key where heads are grouped)."""
        return min(int((label >= 0).sum()) for label in self.dims.values()) // self.size

    def slices(self, index: int | Iterable[int]) -> Slices:
        """Return the positions that one or several indices occupy: ``{parameter name: {dim: LongTensor [positions]}}``.

        Raises:
            IndexError: an index is not in ``range(size)``.

        >>> rows = torch.tensor([0, 0, 0, 1, 1, 1])  # two heads of three channels
        >>> heads = Unit("attention.heads", "heads", 0, 2, dims={("q.weight", 0): rows, ("o.weight", 1): rows})
        >>> heads.slices(1)
        {'q.weight': {0: tensor([3, 4, 5])}, 'o.weight': {1: tensor([3, 4, 5])}}
        """
        indices = torch.tensor([index] if isinstance(index, int) else list(index), dtype=torch.long)
        if indices.numel() and not (int(indices.min()) >= 0 and int(indices.max()) < self.size):
            raise IndexError(f"unit {self.name} has indices 0 to {self.size - 1}, not {index}")
        occupied: Slices = defaultdict(dict)
        for (name, dim), label in self.dims.items():
            occupied[name][dim] = torch.isin(label, indices).nonzero().flatten()
        return dict(occupied)

    def positions(self, name: str, dim: int) -> torch.Tensor:
        """Return the positions of a parameter dim, ordered by index: LongTensor ``[size, positions per index]``.

        Raises:
            KeyError: the unit does not run through this dim.

        >>> rows = torch.tensor([0, 0, 0, 1, 1, 1])  # two heads of three channels
        >>> Unit("attention.heads", "heads", 0, 2, dims={("q.weight", 0): rows}).positions("q.weight", 0)
        tensor([[0, 1, 2],
                [3, 4, 5]])
        """
        label = self.dims[name, dim]
        order = torch.argsort(torch.where(label < 0, self.size, label), stable=True)
        return order[: int((label >= 0).sum())].view(self.size, -1)


class CouplingGraph:
    """Prunable units and frozen axes of a model, as :func:`trace` finds them.

    Attributes:
        units: prunable units, layer by layer; units that span several layers come last.
        frozen: axes that cannot be pruned, each with its reason in ``Unit.frozen``.
        unknown_operators: operators without a rule; each maps to the module that used it first.
        shapes: shape of every tensor in the checkpoint, by name.
        on_meta: True if the model was traced on shapes alone, False if it had to be run on its weights.
        model_class: name of the model's class.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)
    >>> trace(LlamaForCausalLM(LlamaConfig(vocab_size=96, num_hidden_layers=1, **sizes))).of_kind("neurons")[0].size
    48
    """

    def __init__(
        self,
        units: list[Unit],
        frozen: list[Unit],
        unknown: dict[str, str],
        shapes: dict[str, tuple],
        *,
        on_meta: bool = True,
        model_class: str = "",
    ):
        self.units = units
        self.frozen = frozen
        self.unknown_operators = unknown
        self.shapes = shapes
        self.on_meta = on_meta
        self.model_class = model_class
        self._by_name = {unit.name: unit for unit in units}

    def unit(self, name: str) -> Unit:
        """Return the unit called ``name``.

        Raises:
            KeyError: no unit has this name; the message lists the nearest names.
        """
        if name not in self._by_name:
            near = difflib.get_close_matches(name, self._by_name, n=3, cutoff=0.0)
            raise KeyError(f"no unit is called {name!r}; the nearest are {', '.join(near)}")
        return self._by_name[name]

    def copy(self) -> CouplingGraph:
        """Return a copy whose units can be frozen without changing this graph."""
        units, frozen = ([replace(unit) for unit in units] for units in (self.units, self.frozen))
        return CouplingGraph(
            units,
            frozen,
            self.unknown_operators,
            self.shapes,
            on_meta=self.on_meta,
            model_class=self.model_class,
        )

    def of_kind(self, *kinds: str) -> list[Unit]:
        """Return the prunable units of these kinds, in the graph's order."""
        return [unit for unit in self.units if unit.kind in kinds]

    def freeze(self, unit: Unit, reason: str) -> None:
        """Move a unit from the prunable units to the frozen ones, with the reason."""
        unit.frozen = reason
        self.units.remove(unit)
        del self._by_name[unit.name]
        self.frozen.append(unit)

    def parameters_of(self, unit: Unit) -> float:
        """Return the number of parameters that removing all indices of a unit would remove."""
        stays: dict[str, float] = defaultdict(lambda: 1.0)
        for (name, _), label in unit.dims.items():
            stays[name] *= 1 - int((label >= 0).sum()) / len(label)
        return sum((1 - share) * prod(self.shapes[name]) for name, share in stays.items())

    def table(self) -> Cells:
        """Return a table of the units with a row per kind; the first row is the head."""
        cells = [["kind", "units", "indices each", "of the parameters", "flags"]]
        for kind in dict.fromkeys(unit.kind for unit in self.units):
            units = self.of_kind(kind)
            sizes = [unit.size for unit in units]
            each = f"{min(sizes):,}" if min(sizes) == max(sizes) else f"{min(sizes):,} to {max(sizes):,}"
            flags = " ".join(sorted(set().union(*(unit.flags for unit in units))))
            share = sum(self.parameters_of(unit) for unit in units) / self._parameter_count
            cells.append([kind, f"{len(units):,}", each, percent(share), flags])
        return cells

    @property
    def _parameter_count(self) -> int:
        return sum(prod(shape) for shape in self.shapes.values())

    def title(self) -> str:
        """Return the first line of the representations."""
        parameters = amount(self._parameter_count)
        return f"{self.model_class or 'model'}: {parameters} parameters, {len(self.units)} prunable units"

    def __repr__(self) -> str:
        kinds = ", ".join(f"{units} x {each} {kind}" for kind, units, each, *_ in self.table()[1:])
        return f"CouplingGraph of {self.title()}\n  {kinds}"

    def _repr_html_(self) -> str:
        return html_table(f"CouplingGraph of {self.title()}", self.table())

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the share of the model's parameters that units run through, by layer and kind.

        Raises:
            PrunerError: the graph has no units, or matplotlib is not installed.
        """
        shares = by_layer(part for unit in self.units for part in self._parts(unit))
        return plot_shares(shares, title=self.title(), label="share of the parameters", ax=ax)

    def _parts(self, unit: Unit) -> Iterable[Part]:
        """Return the share of the parameters that a unit runs through; of whole layers, layer by layer."""
        if unit.kind != "layers":
            return [(unit.name, unit.layer, self.parameters_of(unit) / self._parameter_count)]
        sizes = [(int(label[0]), prod(self.shapes[name])) for (name, _), label in unit.dims.items()]
        return [(unit.name, layer, size / self._parameter_count) for layer, size in sizes]


def trace(model: nn.Module, inputs: Mapping[str, torch.Tensor] | None = None) -> CouplingGraph:
    """Find every prunable unit of a model.

    The graph is cached until the model is deleted or its structure changes.

    Args:
        model: Hugging Face model, with weights or on the meta device. It runs once on meta tensors, and on its weights
            only if that fails. Its mode and its attention implementation stay as they are.
        inputs: two samples, by the names of the arguments of ``forward``, as the model's processor returns them
            (default: token ids, images, spectrograms or waveforms of the sizes that the config states). A model that
            reads text and images is traced on text alone by default, which freezes its hidden channels. Later calls
            without ``inputs`` return the graph found with them.

    Returns:
        The units and frozen axes; freezing a unit of it does not change the cached graph.

    Raises:
        TraceError: the model cannot be run; the message names the module and the cause.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)
    >>> graph = trace(LlamaForCausalLM(LlamaConfig(vocab_size=96, num_hidden_layers=2, **sizes)))
    >>> [(unit.name, unit.size) for unit in graph.of_kind("heads", "neurons") if unit.layer == 1]
    [('model.layers.1.self_attn.heads', 2), ('model.layers.1.mlp.neurons', 48)]
    >>> neuron = graph.unit("model.layers.1.mlp.neurons").slices(7)  # rows of two weights, a column of the third
    >>> [(name.split(".")[-2], dim, positions.tolist()) for name, d in neuron.items() for dim, positions in d.items()]
    [('gate_proj', 0, [7]), ('up_proj', 0, [7]), ('down_proj', 1, [7])]
    """
    structure = fingerprint(model)
    traced_structure, graph = _traced.get(model, (None, None))
    if graph is None or traced_structure != structure or inputs is not None:
        with nullcontext() if inputs is None else remembering(model, check_inputs(model, inputs)):
            graph = _trace(model)
        if graph.on_meta or inputs is not None:  # a graph found on weights may depend on their values
            _traced[model] = structure, graph
    return graph.copy()


def share_graph(model: nn.Module, like: nn.Module) -> None:
    """Reuse the cached graph of ``like`` for a model of the same structure; :func:`trace` ignores any other."""
    if like in _traced:
        _traced[model] = _traced[like]


_traced: WeakKeyDictionary[nn.Module, tuple[Hashable, CouplingGraph]] = WeakKeyDictionary()


@torch.inference_mode(False)  # in inference mode, operators that torch composes of others reach the tracer whole
def _trace(model: nn.Module) -> CouplingGraph:
    for path, module in model.named_modules():
        if type(module).__module__.startswith("peft."):
            raise TraceError(f"{path or 'the model'} holds an adapter that is not merged: call merge_and_unload first")
    for name, parameter in model.named_parameters():
        if 0 in parameter.shape and type(_owner(model, name)).__module__.startswith("torch."):
            raise TraceError(f"{name} is {list(parameter.shape)}: a model with an empty weight cannot be pruned")
    tracer, dims = run(model)
    shapes = shapes_of(model)
    constants = by_leaf(tracer.constants)
    occurrences = join_groups(_occurrences(dims))
    layer_of = LayerLocator(list(layer_lists(model)))
    units = [_unit(atom, where, layer_of, occurrences, constants.get(id(atom), [])) for atom, where in occurrences]
    units += _layer_units(model, shapes)
    stacked = {n for n, s in shapes.items() if len(s) == 3 and not isinstance(_owner(model, n), nn.Conv1d)}
    routed = {u.layer for u in units if u.kind == "neurons" and any(name in stacked for name, _ in u.dims)}
    for unit in units:
        inside = any(name in stacked and dim > 0 for name, dim in unit.dims)
        # Shared experts too: their width is often the same field of the config.
        if unit.size % 8 == 0 and (inside or (unit.kind == "neurons" and unit.layer in routed)):
            unit.multiple = 8
        if unit.kind == "hidden":
            unit.multiple = lcm(unit.multiple, hidden_multiple(model, unit.size))
    judge_by_twins(model, units, tracer.idle)
    fixed = fixed_heads(model)
    for unit in units:
        if unit.frozen is None and unit.kind in ("heads", "query_heads") and fixed & {*unit.parameters}:
            unit.frozen = FIXED
    _name(units)
    units.sort(key=lambda u: (u.layer is None, u.layer or 0, KINDS.index(u.kind)))
    free = [unit for unit in units if unit.frozen is None]
    frozen = [unit for unit in units if unit.frozen is not None]
    name, on_meta = type(model).__name__, tracer.device.type == "meta"
    return CouplingGraph(free, frozen, tracer.unknown, shapes, on_meta=on_meta, model_class=name)


def _owner(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def _occurrences(dims: dict[str, list[Dim]]) -> list[Occurrence]:
    """Return every leaf with the parameter dims that it runs through."""
    atoms: dict[int, Atom] = {}
    where: dict[int, dict[tuple[str, int], torch.Tensor]] = defaultdict(dict)
    for name, parameter in dims.items():
        for axis, dim in enumerate(parameter if all(map(size_of, parameter)) else ()):  # an empty tensor has no index
            by_leaf = labels(dim)
            for leaf in leaves(dim):
                atoms[id(leaf)] = leaf
                label = by_leaf[id(leaf)]
                if not label.numel():
                    leaf.frozen = leaf.frozen or "it meets itself in one dimension"
                where[id(leaf)][name, axis] = label
    return [(atoms[key], where[key]) for key in atoms if atoms[key].size > 1]


def _unit(
    atom: Atom, dims: dict, layer_of: LayerLocator, occurrences: list[Occurrence], constants: list[Constant]
) -> Unit:
    layers = {layer_of(name) for name, _ in dims}
    layer = next(iter(layers)) if len(layers) == 1 else None
    kind = kind_of(atom, dims, layers, occurrences)
    frozen = atom.frozen
    if frozen is None and constants and kind not in ("heads", "query_heads"):
        frozen = COMBINED
    if frozen is None and kind != "vocabulary" and len(dims) < 2:
        frozen = "only one parameter has it"
    return Unit(
        "",
        kind,
        layer[1] if layer else None,
        atom.size,
        frozenset(atom.flags),
        frozen,
        fewest(atom),
        groups=groups_of(atom),
        dims=dims,
        constants=constants,
    )


def _layer_units(model: nn.Module, shapes: dict[str, tuple]) -> list[Unit]:
    """Return one unit per stack of layers: index i occupies every row of every tensor of layer i."""
    units = []
    for path, stack in layer_lists(model).items():
        if len(stack) < 2:
            continue
        dims = {}
        for i in range(len(stack)):
            for name, shape in shapes.items():
                if name.startswith(f"{path}.{i}.") and shape:
                    dims[name, 0] = torch.full((shape[0],), i)
        units.append(Unit(f"{path}.layers", "layers", None, len(stack), dims=dims))
    return units


def _name(units: list[Unit]) -> None:
    """Name each unit after the smallest module that holds all of it, and after its kind."""
    seen: dict[str, list[Unit]] = defaultdict(list)
    for unit in units:
        if not unit.name:
            unit.name = f"{common_path(unit.parameters)}.{unit.kind}".lstrip(".")
        seen[unit.name].append(unit)
    for name, same in seen.items():
        for i, unit in enumerate(same):
            if len(same) > 1:
                unit.name = f"{name}.{i}"
