"""One traced operator call, as a rule sees it, and the registry of rules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from .axes import Dim

FIXED_INDEX = "one fixed index of it is read"


@dataclass
class Traced:
    """State of one tensor during the trace.

    ``role`` is ``constant`` (depends on neither weights nor tokens), ``weight`` or ``activation``.
    ``index_of`` is set for integer tensors whose values are positions along a known dim.
    """

    tensor: torch.Tensor
    dims: list[Dim]
    role: str = "activation"
    index_of: Dim | None = None


class Recorder(Protocol):
    """Interface of the tracer to rules: look up the state of a tensor, record the state of an output or a selection."""

    def lookup(self, tensor: torch.Tensor) -> Traced: ...

    def record(self, traced: Traced) -> None: ...

    def pick(self, source: Traced, at: int, index: int) -> None: ...


@dataclass
class Call:
    """One operator call: its arguments by schema name and its output."""

    tracer: Recorder
    func: Any
    args: dict[str, Any]
    out: Any
    traced_inputs: list[Traced] = field(default_factory=list)

    def __getitem__(self, name: str) -> Any:
        return self.args.get(name)

    def get(self, name: str) -> Traced:
        """Return the traced tensor passed as argument ``name``."""
        return self.tracer.lookup(self.args[name])

    def dims(self, name: str) -> list[Dim]:
        return self.get(name).dims

    def dim(self) -> int:
        """Return argument ``dim`` as a non-negative index into the dims of argument ``self``."""
        return self.args["dim"] % max(len(self.dims("self")), 1)

    @property
    def role(self) -> str:
        roles = {t.role for t in self.traced_inputs}
        return next((r for r in ("activation", "weight") if r in roles), "constant")

    def set(
        self, dims: list[Dim], out: torch.Tensor | None = None, index_of: Dim | None = None, role: str | None = None
    ) -> None:
        """Record the dims of the output (or of ``out``, where there are several)."""
        tensor = self.out if out is None else out
        self.tracer.record(Traced(tensor, dims, role or self.role, index_of))


Rule = Callable[[Call], None]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule under the names of its operators, without ``aten::`` and without the overload."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Yield every tensor in (possibly nested) arguments."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
