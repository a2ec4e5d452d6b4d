"""Operators that read or write at positions.

What the positions point into decides: positions chosen by top-k along an axis (experts) tie the indexed
axis to that one; token ids tie it to the vocabulary; anything else freezes it.
"""

from __future__ import annotations

import torch

from ..axes import Dim, freeze, fresh, leaves, size_of, tag, unify
from ..call import Call, Traced, rule
from .layout import reshape
from .pointwise import broadcast


def point(dim: Dim, index: Traced) -> None:
    """Record that ``dim`` is read at the values of ``index``."""
    if index.index_of is None or size_of(index.index_of) != size_of(dim):
        freeze(dim, "read at positions that no axis gives")
    else:
        unify(dim, index.index_of)
        tag(dim, "indexed")


@rule("embedding")
def embedding(call: Call) -> None:
    rows, columns = call.dims("weight")
    index = call.get("indices")
    point(rows, index)
    if any("vocabulary" in leaf.tags for leaf in leaves(rows)):
        tag(columns, "hidden")
    call.set([*index.dims, columns])


@rule("index_select")
def index_select(call: Call) -> None:
    dims, axis, index = list(call.dims("self")), call.dim(), call.get("index")
    point(dims[axis], index)
    dims[axis] = index.dims[0] if index.dims else ()
    call.set(dims)


@rule("index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put")
def index(call: Call) -> None:
    """Replace the indexed dims of ``x[i, :, j]`` and ``x[i, :, j] = v`` by the common shape of the indices."""
    dims = call.dims("self")
    indices = [None if t is None else call.tracer.lookup(t) for t in call["indices"]]
    indices += [None] * (len(dims) - len(indices))
    used = [i for i, t in enumerate(indices) if t is not None]
    writes = "values" in call.args
    if any(t is not None and t.tensor.dtype in (torch.bool, torch.uint8) for t in indices):
        return _masked(call, dims, indices, writes)
    shapes = [indices[i].dims for i in used]  # type: ignore[union-attr]
    common = broadcast(shapes, max(map(len, shapes)))
    for i in used:
        point(dims[i], indices[i])  # type: ignore[arg-type]
    adjacent = used == list(range(used[0], used[-1] + 1))
    at = used[0] if adjacent else 0
    rest = [d for i, d in enumerate(dims) if i not in used]
    picked = [*rest[:at], *common, *rest[at:]]
    if writes:
        broadcast([picked, call.dims("values")], len(picked))
        call.set(dims)
    else:
        call.set(picked, role=call.get("self").role)  # weights picked by tokens are still weights
    return None


def _masked(call: Call, dims: list[Dim], indices: list[Traced | None], writes: bool) -> None:
    """Replace the dims of a mask by one, the selected positions; the others pass."""
    reason = "selected by a mask"
    at, *more = [i for i, index in enumerate(indices) if index is not None]
    mask = indices[at]
    assert mask is not None
    covered = dims[at : at + mask.tensor.ndim]
    rest = dims[:at], dims[at + mask.tensor.ndim :]
    if more:  # together with other indices: no dim is where it was
        rest = [], []
        covered = [*dims, *(call.dims("values") if writes else [])]
    for dim in covered:
        freeze(dim, reason)
    if writes:
        picked: list[Dim] = [*rest[0], (), *rest[1]]
        values = list(call.dims("values"))
        if len(values) == len(picked):
            values[at] = ()
        broadcast([picked, values], max(len(picked), len(values)))
        call.set(dims)
    else:
        picked = [*rest[0], fresh(call.out.shape[at], reason), *rest[1]]
        call.set(picked if not more else [fresh(n, reason) for n in call.out.shape])


@rule("masked_scatter", "masked_scatter_")
def masked_scatter(call: Call) -> None:
    """Write the source's rows, one after the other, where a mask is set, as images are written between tokens.

    A row holds the last dims, along which the mask is the same; the others are selected from.
    """
    dims, mask, source = call.dims("self"), call.get("mask").tensor, call.get("source")
    padded = [1] * (len(dims) - mask.ndim)
    repeats = [n == 1 or not step for n, step in zip([*padded, *mask.shape], [*padded, *mask.stride()], strict=True)]
    rank = next((i for i, same in enumerate(reversed(repeats)) if not same), len(dims))
    row = dims[len(dims) - rank :]
    for dim in dims[: len(dims) - rank]:
        freeze(dim, "selected by a mask")
    count, rest = divmod(source.tensor.numel(), size_of(d for dim in row for d in dim))
    if rest:
        for dim in row:
            freeze(dim, "a part of it is written where a mask is set")
    else:
        rows, *parts = reshape(source.dims, (count, *map(size_of, row)))
        freeze(rows, "written where a mask is set")
        for dim, part in zip(row, parts, strict=True):
            unify(dim, part)
    call.set(dims)


@rule("gather")
def gather(call: Call) -> None:
    dims, axis, at = call.dims("self"), call.dim(), call.get("index")
    point(dims[axis], at)
    for i, (dim, other) in enumerate(zip(dims, at.dims, strict=True)):
        if i != axis:
            _along(dim, other)
    call.set(at.dims)


@rule("scatter", "scatter_", "scatter_add", "scatter_add_", "scatter_reduce", "scatter_reduce_")
def scatter(call: Call) -> None:
    dims, axis, at = call.dims("self"), call.dim(), call.get("index")
    point(dims[axis], at)
    others = [at] + ([call.get("src")] if call["src"] is not None else [])
    for other in others:
        for i, (dim, theirs) in enumerate(zip(dims, other.dims, strict=True)):
            if i != axis:
                _along(dim, theirs)
    call.set(dims)


def _along(dim: Dim, index: Dim) -> None:
    """Unify a dim with the index that runs along it; an index that ends early covers only the first positions."""
    if size_of(dim) == size_of(index):
        unify(dim, index)
    else:
        freeze(dim, "read or written at its first positions only")


@rule("index_add", "index_add_", "index_copy", "index_copy_", "index_fill", "index_fill_")
def index_add(call: Call) -> None:
    dims, axis = call.dims("self"), call.dim()
    point(dims[axis], call.get("index"))
    if "source" in call.args:
        for i, (dim, theirs) in enumerate(zip(dims, call.dims("source"), strict=True)):
            if i != axis:
                unify(dim, theirs)
    call.set(dims)


@rule("nonzero")
def nonzero(call: Call) -> None:
    """Return the positions of one axis as indices that point into it; those of several axes are no index of any."""
    dims = call.dims("self")
    for dim in dims if len(dims) > 1 else ():
        freeze(dim, "its positions are read as numbers")
    call.set([fresh(len(call.out)), fresh(len(dims))], index_of=dims[0] if len(dims) == 1 else None, role="activation")


@rule("one_hot")
def one_hot(call: Call) -> None:
    at = call.get("self")
    known = at.index_of is not None and size_of(at.index_of) == call.out.shape[-1]
    call.set([*at.dims, at.index_of if known and at.index_of else fresh(call.out.shape[-1], "one-hot")])
