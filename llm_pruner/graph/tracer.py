"""Run a model once and follow its axes through every operator.

Read :mod:`llm_pruner.graph.axes` first. The model runs eagerly, on the meta device, so no weight is read
and a 70B model traces in the memory of its shapes. Each parameter dim starts as one fresh atom; the rules
of :mod:`llm_pruner.graph.rules` couple them; :mod:`llm_pruner.graph.units` reads the result.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from ..errors import PrunerError
from ..models.inputs import (
    IDS,
    ModelInputs,
    ended,
    example_inputs,
    has_remembered_inputs,
    input_embedding,
    reads_text_only,
    reads_whole_text,
)
from ..models.per_layer import Constant
from ..models.running import answer_on_meta, main_output, model_inputs, stored_tensors, tracing_mode
from ..models.tasks import has_token_logits
from ..models.torch_internals import TorchDispatchMode, storage_key
from .axes import Atom, Dim, freeze, fresh, leaves, size_of, split_concat, tag, unify
from .call import FIXED_INDEX, RULES, Call, Traced, tensors_in
from .constants import COMBINED, separate_constants
from .fingerprint import uniform_axes
from .rules import indexing

TRACE_ROWS, TRACE_TOKENS = 2, 16  # long enough for every branch of a decoder to run, short enough to be free


class TraceError(PrunerError):
    """Error: the model could not be run for tracing."""


class UnknownInputs(TraceError):
    """Error: the inputs of a model cannot be guessed, with or without its weights."""


class Tracer(TorchDispatchMode):
    """Dispatch mode that follows axes through the operators that run while it is active."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        # Traced tensors are kept alive: the ids of dead ones would be reused.
        self.traced: dict[int, Traced] = {}
        self.order: dict[int, int] = {}  # when each tensor was first used
        self.unknown: dict[str, str] = {}
        self.modules: list[str] = []
        self.constants: list[tuple[Atom, Constant]] = []
        self.calls: list[tuple[list[int], list[int]]] = []  # what each operator wrote and read, by storage
        self.alive: list[torch.Tensor] = []  # the ids of dead tensors and storages would be reused
        self.idle: set[str] = set()  # tensors that the output does not depend on
        # The last axis of which an index was read as a number, and the index; None where a number per index was.
        self.read: tuple[Dim, int | None] = ((), 0)
        self.followed: list[tuple[Dim, int, Dim]] = []  # dims selected at such an index, the index and its axis

    @property
    def where(self) -> str:
        return self.modules[-1] if self.modules else "the model"

    def record(self, traced: Traced) -> None:
        traced.dims = [() if size_of(dim) == 1 else dim for dim in traced.dims]
        self.traced[id(traced.tensor)] = traced

    def lookup(self, tensor: torch.Tensor) -> Traced:
        """Return the record of a tensor; a tensor that no traced operator made is a constant."""
        traced = self.traced.get(id(tensor))
        if traced is None:
            traced = Traced(tensor, [fresh(n, COMBINED) for n in tensor.shape], "constant")
            self.record(traced)
        return traced

    def pick(self, source: Traced, at: int, index: int) -> None:
        """Record that one index of a dim is selected: one that an axis gave before, or a fixed one."""
        dim, (axis, value) = source.dims[at], self.read
        in_full_loop = value is None and source.role == "weight" and size_of(dim) == size_of(axis)
        if (index == value and 1 < size_of(dim) <= size_of(axis)) or in_full_loop:
            self.followed.append((dim, index, axis))
        else:
            freeze(dim, FIXED_INDEX)

    def couple_followed(self) -> None:
        """Couple the dims that were selected at several indices of an axis, as they were read, with this axis.

        A loop over experts does so. A longer axis has experts without weights at its end.
        """
        by_dim: dict[tuple[int, ...], list[tuple[Dim, int, Dim]]] = defaultdict(list)
        for dim, index, axis in self.followed:
            by_dim[tuple(id(leaf) for leaf in leaves(dim))].append((dim, index, axis))
        for group in by_dim.values():
            if len({index for _, index, _ in group}) == 1:
                freeze(group[0][0], FIXED_INDEX)
                continue
            for dim, _, axis in group:
                size, whole = size_of(dim), size_of(axis)
                weighted, rest = split_concat(axis, [size, whole - size])
                unify(dim, weighted)
                tag(dim, "indexed")
                freeze(rest if size < whole else (), "it has no weights of its own")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if (answer := answer_on_meta(name, args)) is not None:
            return answer
        # Looked up before the call: in-place operators change shapes and strides under our feet.
        inputs = [self.lookup(t) for t in tensors_in([*args, *kwargs.values()])]
        for traced in inputs:
            self.order.setdefault(id(traced.tensor), len(self.order))
        out = func(*args, **kwargs)
        self.alive.extend(tensors_in(out))
        self.calls.append(([storage_key(t) for t in tensors_in(out)], [storage_key(t.tensor) for t in inputs]))
        if name == "_local_scalar_dense" and (axis := inputs[0].index_of):
            self.read = axis, int(out)
        outs = [t for t in tensors_in(out) if id(t) not in self.traced or any(t is a for a in args)]
        if not outs:
            return out
        rule = RULES.get(name)
        if rule is None and torch.Tag.pointwise in func.tags:
            rule = RULES["clone"]
        if rule is None:
            self._freeze_unknown(name, inputs, outs)
            return out
        schema = func._schema.arguments
        given = {a.name: a.default_value for a in schema if a.has_default_value()}
        given |= dict(zip((a.name for a in schema), args, strict=False)) | kwargs
        call = Call(self, func, given, out, inputs)
        rule(call)
        if rule.__module__ != indexing.__name__:
            self._check_indices(name, inputs, outs)
        for tensor in outs:
            self._check(name, tensor)
        return out

    def reaching(self, result: torch.Tensor) -> set[int]:
        """Return the storages that a result depends on: followed backwards, through views and writes in place alike."""
        needed = {storage_key(result)}
        for written, read in reversed(self.calls):
            if needed.intersection(written):
                needed.update(read)
        return needed

    def _check_indices(self, name: str, inputs: list[Traced], outs: list[torch.Tensor]) -> None:
        """Freeze an axis whose indices are used as mere numbers: their order matters in a way no rule follows."""
        if any(self.lookup(t).index_of for t in outs):
            return
        for traced in inputs:
            if traced.index_of and not any("vocabulary" in leaf.tags for leaf in leaves(traced.index_of)):
                freeze(traced.index_of, f"its indices are used as numbers by {name} in {self.where}")

    def _freeze_unknown(self, name: str, inputs: list[Traced], outs: list[torch.Tensor]) -> None:
        if all(t.role == "constant" for t in inputs):
            return  # what it makes is met as a constant, which freezes soon enough
        reason = f"no rule for operator {name} in {self.where}"
        self.unknown.setdefault(name, self.where)
        for traced in inputs:
            for dim in traced.dims:
                freeze(dim, reason)
        for tensor in outs:
            self.record(Traced(tensor, [fresh(n, reason) for n in tensor.shape]))

    def _check(self, name: str, tensor: torch.Tensor) -> None:
        """Refuse a rule that disagrees with the shape it explains: its axes would be silently wrong."""
        known = self.traced.get(id(tensor))
        if known is None:
            return
        sizes = [size_of(d) for d in known.dims]
        if sizes != list(tensor.shape):
            raise TraceError(f"rule {name} gives dims {sizes} for shape {list(tensor.shape)} in {self.where}")


class Rewritten(TorchFunctionMode):
    """A mode that reads ``x[[-2]]`` as the slice that it is, and one-hot vectors as what is written at indices.

    A list of consecutive positions written in the code becomes an index tensor before any operator runs, and on
    the meta device its values are gone by then. ``one_hot`` compares the indices with a range, as numbers.
    """

    def __init__(self, tracer: Tracer):
        super().__init__()
        self.tracer = tracer

    def _one_hot(self, index: torch.Tensor, num_classes: int = -1) -> torch.Tensor | None:
        """Return one-hot vectors of the indices of an axis, None for other numbers."""
        size = size_of(self.tracer.lookup(index).index_of or ())
        if num_classes < size or size == 1:
            return None
        zeros = torch.zeros(*index.shape, size, dtype=index.dtype, device=index.device)
        return nn.functional.pad(zeros.scatter(-1, index.unsqueeze(-1), 1), (0, num_classes - size))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__getitem__ and isinstance(args[1], tuple):
            lists = [i for i, item in enumerate(args[1]) if isinstance(item, list)]
            if len(lists) == 1 and not any(isinstance(item, torch.Tensor) for item in args[1]):
                at, positions = lists[0], args[1][lists[0]]
                if positions and positions == list(range(positions[0], positions[0] + len(positions))):
                    run = slice(positions[0], positions[-1] + 1 or None)
                    args = (args[0], (*args[1][:at], run, *args[1][at + 1 :]))
        if func is torch.Tensor.tolist and len(dims := self.tracer.lookup(args[0]).dims) == 1:
            self.tracer.read = dims[0], None
        if func is nn.functional.one_hot and (vectors := self._one_hot(*args, **(kwargs or {}))) is not None:
            return vectors
        return func(*args, **(kwargs or {}))


@contextmanager
def module_names(model: nn.Module, tracer: Tracer) -> Iterator[None]:
    """Keep ``tracer.modules`` at the stack of modules being run, for messages."""
    names = {id(m): n for n, m in model.named_modules()}

    def enter(module: nn.Module, _: Any) -> None:
        tracer.modules.append(names.get(id(module), type(module).__name__))

    def leave(module: nn.Module, _: Any, __: Any) -> None:
        tracer.modules.pop()

    with ExitStack() as stack:
        stack.callback(register_module_forward_pre_hook(enter).remove)
        stack.callback(register_module_forward_hook(leave).remove)
        yield


def _snapshot(model: nn.Module) -> Callable[[], None]:
    """Return a function that restores every attribute and buffer of a model as it is now.

    Some models note on their modules what they have seen: rotary embeddings of dynamic length keep the longest. And
    transformers hooks into the layers of a model that is run for the first time, to record hidden states.
    """
    slots = ("__dict__", "_buffers", "_forward_hooks", "_forward_pre_hooks")
    saved = [
        (vars(module) if slot == "__dict__" else vars(module)[slot]) for module in model.modules() for slot in slots
    ]
    copies = [dict(values) for values in saved]

    def restore() -> None:
        for values, before in zip(saved, copies, strict=True):
            values.clear()
            values.update(before)

    return restore


@contextmanager
def _prepare(model: nn.Module, tracer: Tracer) -> Iterator[None]:
    """Prepare a model for tracing, and restore it afterwards."""
    with ExitStack() as stack:
        stack.callback(_snapshot(model))
        for context in (
            torch.no_grad(),
            tracing_mode(model),
            module_names(model, tracer),
            separate_constants(model, tracer, tracer.constants),
        ):
            stack.enter_context(context)
        stack.enter_context(Rewritten(tracer))
        yield


def run(model: nn.Module) -> tuple[Tracer, dict[str, list[Dim]]]:
    """Trace a model; return the tracer and the dims of every tensor that a checkpoint holds, by name.

    The dims are in the order in which the model first uses their tensors: queries before keys, whatever the
    order in which the layer lists them. Two samples are run (default: of 16 tokens), on the meta device. Models that
    read values on their way (which tokens does this expert get?) cannot do so there; they are run once more on their
    weights.

    Raises:
        TraceError: neither works; the message names the module and the cause.
    """
    try:
        return _trace_on(model, torch.device("meta"))
    except UnknownInputs:
        raise
    except TraceError as on_meta:
        if any(tensor.device.type == "meta" for tensor in stored_tensors(model).values()):
            raise TraceError(f"{on_meta}; a model with its weights may do better") from on_meta
        return _trace_on(model, next(iter(stored_tensors(model).values())).device)


def _trace_on(model: nn.Module, device: torch.device) -> tuple[Tracer, dict[str, list[Dim]]]:
    tracer = Tracer(device)
    named = stored_tensors(model)
    state: dict[str, torch.Tensor] = {}
    twins: dict[int, torch.Tensor] = {}  # tied tensors stay one tensor
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        if id(tensor) not in twins:
            on_meta = device.type == "meta"
            twins[id(tensor)] = torch.empty_like(tensor, device="meta") if on_meta else tensor.detach()
        state[name] = twins[id(tensor)]
    dims: dict[str, list[Dim]] = {}
    for name, tensor in named.items():
        dims[name] = [fresh(n) for n in tensor.shape]
        tracer.record(Traced(twins[id(tensor)], dims[name], "weight"))
    for name, tensor in [*model.named_buffers(), *model.named_parameters()]:
        if name not in named and id(twins[id(tensor)]) not in tracer.traced:
            # A constant freezes what it meets, unless it is the same at every index of the axis.
            reasons = (None if uniform else COMBINED for uniform in uniform_axes(tensor))
            constant = [fresh(size, reason) for size, reason in zip(tensor.shape, reasons, strict=True)]
            tracer.record(Traced(twins[id(tensor)], constant, "constant"))

    vocabulary = _vocabulary(model)
    inputs = {}
    for name, value in _inputs_to_trace(model, vocabulary).items():
        inputs[name] = value.to(device)
        of_tokens = vocabulary if name in IDS else None
        tracer.record(Traced(inputs[name], [fresh(n) for n in value.shape], "activation", of_tokens))
    extra = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    try:
        with _prepare(model, tracer), tracer:
            output = torch.func.functional_call(model, state, args=(), kwargs={**inputs, **extra}, tie_weights=False)
            logits = main_output(output)
    except TraceError:
        raise
    except Exception as error:
        raise TraceError(
            f"{type(model).__name__} could not be run on the {device.type} device, in {tracer.where}: "
            f"{type(error).__name__}: {error}"
        ) from error
    tracer.couple_followed()
    _tie_ends(model, tracer.lookup(logits).dims, vocabulary)
    if inputs.keys() <= IDS:
        _freeze_what_images_reach(model, named, dims)
    reaching = tracer.reaching(logits)
    tracer.idle = {name for name, tensor in named.items() if storage_key(twins[id(tensor)]) not in reaching}
    first_use = {name: tracer.order.get(id(twins[id(tensor)]), len(tracer.order)) for name, tensor in named.items()}
    return tracer, {name: dims[name] for name in sorted(dims, key=first_use.__getitem__)}


def _tie_ends(model: nn.Module, columns: list[Dim], vocabulary: Dim | None) -> None:
    """Make the output's last dim and the vocabulary one axis, where an id means one token on both ends."""
    if vocabulary is not None and has_token_logits(model):
        if size_of(columns[-1]) == size_of(vocabulary):
            unify(columns[-1], vocabulary)
            return
        freeze(vocabulary, "the output has another size")
    for dim in columns[1:]:
        freeze(dim, "the output of the model")


def _freeze_what_images_reach(model: nn.Module, named: dict[str, torch.Tensor], dims: dict[str, list[Dim]]) -> None:
    """Freeze the hidden axis of a model that was traced on text and also reads images or audio: a projector that no
    text runs writes to it."""
    config = getattr(model, "config", None)
    towers = any(getattr(config, tower, None) is not None for tower in ("vision_config", "audio_config"))
    if towers and reads_text_only(model):
        embedding = model.get_input_embeddings().weight  # type: ignore[operator]
        name = next(name for name, tensor in named.items() if tensor is embedding)
        freeze(dims[name][1], "images or audio are written to it by a projector, and only text is traced")


def _vocabulary(model: nn.Module) -> Dim | None:
    """Return the axis of token ids, None for a model that reads none."""
    embedding = input_embedding(model)
    if embedding is None:
        return None
    vocabulary = fresh(embedding.weight.shape[0])
    tag(vocabulary, "vocabulary")
    return vocabulary


def _inputs_to_trace(model: nn.Module, vocabulary: Dim | None) -> dict[str, torch.Tensor]:
    """Return the example inputs of a model, with ids that differ from each other where it has them by chance."""
    try:
        examples = example_inputs(model, TRACE_ROWS, TRACE_TOKENS)
    except PrunerError as error:
        raise UnknownInputs(f"{error}: it cannot be traced") from error
    if isinstance(examples, ModelInputs) and has_remembered_inputs(model):
        return examples.tensors()
    inputs = model_inputs(model, examples)
    if vocabulary is not None:
        for name in IDS & inputs.keys():
            ids = torch.arange(TRACE_ROWS * TRACE_TOKENS).view(TRACE_ROWS, TRACE_TOKENS) * 31
            ids = ids % size_of(vocabulary)
            inputs[name] = ended(model, ids) if reads_whole_text(model) else ids
    return inputs
