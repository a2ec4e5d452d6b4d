"""Operators that fold an axis away, and those that order it.

A reduced axis can still be permuted, so it stays prunable; but a mean over fewer indices is another
mean, so removing is no longer the same as zeroing. That is the ``norm`` flag.
"""

from __future__ import annotations

from typing import Any

from ..axes import Dim, flag, freeze, fresh, size_of, tag
from ..call import Call, rule, tensors_in
from ..routing import top_k_tag
from .pointwise import pointwise


def axes_of(value: Any, rank: int) -> list[int]:
    """Return the ``dim`` argument of a reduction as non-negative axes; absent or empty means all of them."""
    if value is None or value == []:
        return list(range(rank))
    return [v % max(rank, 1) for v in (value if isinstance(value, (list, tuple)) else [value])]


@rule(
    "sum", "mean", "var", "std", "var_mean", "prod", "amax", "amin", "max", "min", "norm",
    "linalg_vector_norm", "logsumexp", "any", "all", "argmax", "argmin", "median", "count_nonzero",
)  # fmt: skip
def reduce(call: Call) -> None:
    if "other" in call.args:  # max(a, b) of two tensors is pointwise
        return pointwise(call)
    dims = call.dims("self")
    reduced = axes_of(call["dim"], len(dims))
    for axis in reduced:
        flag(dims[axis], "norm")
    kept: list[Dim] = [() if i in reduced else d for i, d in enumerate(dims)]
    if not call["keepdim"]:
        kept = [d for i, d in enumerate(dims) if i not in reduced]
    for out in tensors_in(call.out):
        is_index = not out.is_floating_point() and len(reduced) == 1
        call.set(kept, out, dims[reduced[0]] if is_index else None)
    return None


@rule("topk", "sort", "argsort")
def top_k(call: Call) -> None:
    """Make the chosen slots a new axis, and let the chosen indices point into the old axis."""
    dims = list(call.dims("self"))
    if not dims:
        call.set([], call.out[0])
        call.set([], call.out[1])
        return
    axis = (-1 if call["dim"] is None else call["dim"]) % len(dims)
    source = dims[axis]
    flag(source, "norm")
    outs = list(tensors_in(call.out))
    if call["k"] is not None:
        tag(source, top_k_tag(call["k"], size_of(source)))
    dims[axis] = fresh(outs[0].shape[axis], "the slots of a top-k or sort")
    for out in outs:
        call.set(dims, out, None if out.is_floating_point() else source)


@rule("cumsum", "cumprod", "logcumsumexp", "cummax", "cummin", "_cummax_helper", "diff")
def scan(call: Call) -> None:
    dims = call.dims("self")
    axis = call.dim()
    freeze(dims[axis] if dims else (), "scanned in order")
    tag(dims[axis] if dims else (), "scan")
    for out in tensors_in(call.out):
        call.set(dims if list(out.shape) == list(call.get("self").tensor.shape) else [fresh(n) for n in out.shape], out)


@rule("_softmax", "_log_softmax", "softmax", "log_softmax", "_safe_softmax")
def softmax(call: Call) -> None:
    """Find attention heads: the axes that a softmax over positions is repeated over."""
    dims = call.dims("self")
    axis = call.dim()
    flag(dims[axis], "norm")
    for i, dim in enumerate(dims):
        if i != axis:
            tag(dim, "attention")
    call.set(dims)
