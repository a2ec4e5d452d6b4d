"""Operators that move, split, join and reinterpret dims without touching values."""

from __future__ import annotations

from typing import Any

import torch

from ..axes import Dim, concat, find, flatten, freeze, fresh, size_of, split_concat, split_product, tag, unify
from ..call import FIXED_INDEX, Call, Traced, rule
from ..routing import top_k_tag


def reshape(dims: list[Dim], shape: tuple[int, ...]) -> list[Dim]:
    """Redistribute the atoms of row-major ``dims`` over a new shape of equal size."""
    if 0 in shape:
        return _reshape_empty(dims, shape)
    stack = flatten(atom for dim in dims for atom in dim)[::-1]
    out: list[Dim] = []
    for size in shape:
        taken: list[Any] = []
        while size > 1:
            atom = find(stack.pop())
            if atom.parts and not atom.concatenated:  # refined by an earlier step of this very loop
                stack.extend(flatten([atom])[::-1])
            elif atom.size <= size and size % atom.size == 0:
                taken.append(atom)
                size //= atom.size
            elif atom.size > size and atom.size % size == 0:
                outer, rest = split_product(atom, size)
                taken.extend(outer)
                stack.extend(reversed(rest))
                size = 1
            else:
                reason = f"viewed across the boundary of an axis ({atom.size} into {size})"
                freeze([atom, *taken, *stack], reason)
                return out + [fresh(n, reason) for n in shape[len(out) :]]
        out.append(tuple(taken))
    return out


def _reshape_empty(dims: list[Dim], shape: tuple[int, ...]) -> list[Dim]:
    """Reshape a tensor with a dim of size 0, such as the input of an expert without tokens.

    Its sizes do not tell dims apart, so the last dims of equal size are taken as the same, and the others are frozen.
    """
    reason = "viewed while empty"
    out = [fresh(n, reason) for n in shape]
    agreeing = 0
    for dim, n in zip(dims[::-1], shape[::-1], strict=False):
        if n == 0 or size_of(dim) != n:
            break
        agreeing += 1
        out[len(shape) - agreeing] = dim
    for dim in dims[: len(dims) - agreeing]:
        freeze(dim, reason)
    return out


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "view_copy")
def view(call: Call) -> None:
    source = call.get("self")
    if isinstance(call["dtype"], torch.dtype):  # other bits for the same storage
        for dim in source.dims:
            freeze(dim, "its bits are read as another type")
        call.set([fresh(n, "bits of another type") for n in call.out.shape])
        return
    call.set(reshape(source.dims, tuple(call.out.shape)), index_of=source.index_of)


@rule("view_as_real", "view_as_complex")
def reinterpret(call: Call) -> None:
    """View pairs of reals as complex numbers or back: the pair is an axis that must stay whole."""
    dims = call.dims("self")
    if call.out.ndim < len(dims):
        freeze(dims[-1], "half of a complex number")
        call.set(dims[:-1])
    elif call.out.ndim > len(dims):
        call.set([*dims, fresh(call.out.shape[-1], "half of a complex number")])
    else:
        call.set(dims)


@rule("permute")
def permute(call: Call) -> None:
    dims = call.dims("self")
    call.set([dims[i] for i in call["dims"]], index_of=call.get("self").index_of)


@rule("transpose", "t", "numpy_T", "transpose_", "t_")
def transpose(call: Call) -> None:
    dims = list(call.dims("self"))
    if "dim0" in call.args:
        i, j = call["dim0"], call["dim1"]
        dims[i], dims[j] = dims[j], dims[i]
    else:
        dims.reverse()
    call.set(dims, index_of=call.get("self").index_of)


@rule("unsqueeze", "squeeze", "unsqueeze_", "squeeze_")
def squeeze(call: Call) -> None:
    """Drop dims of size 1 and place the others by their size, which is exact."""
    source = call.get("self")
    call.set(reshape(source.dims, tuple(call.out.shape)), index_of=source.index_of)


@rule("expand", "expand_copy")
def expand(call: Call) -> None:
    """Make a new axis of a dim of size 1; all its indices hold the same values, so it may be unified with any axis."""
    source = call.get("self")
    offset = call.out.ndim - len(source.dims)
    dims = [
        source.dims[i - offset] if i >= offset and source.dims[i - offset] else fresh(n)
        for i, n in enumerate(call.out.shape)
    ]
    call.set(dims, index_of=source.index_of)


@rule("repeat")
def repeat(call: Call) -> None:
    source = call.get("self")
    padded: list[Dim] = [()] * (call.out.ndim - len(source.dims)) + source.dims
    call.set([(*fresh(n), *dim) for n, dim in zip(call["repeats"], padded, strict=True)])


@rule("slice", "narrow")
def slice_(call: Call) -> None:
    source, axis = call.get("self"), call.dim()
    dim, size, kept = source.dims[axis], source.tensor.shape[axis], call.out.shape[axis]
    dims = list(source.dims)
    step = call["step"] or 1
    start = call["start"] or 0
    start = min(max(start + size if start < 0 else start, 0), size)
    if kept == size:
        pass
    elif step == 1:
        dims[axis] = split_concat(dim, [start, kept, size - start - kept])[1]
    elif source.role != "constant" and size % step == 0 and kept * step == size and start < step:
        dims[axis], lane = reshape([dim], (kept, step))
        freeze(lane, f"one in {step} of its indices is taken")
    else:
        freeze(dim, f"one in {step} of its indices is taken")
        dims[axis] = fresh(kept, f"one in {step} of its indices is taken")
    call.set(dims, index_of=source.index_of)


@rule("split", "split_with_sizes", "chunk", "unsafe_chunk", "unsafe_split", "split_copy", "tensor_split")
def split(call: Call) -> None:
    source, axis = call.get("self"), call.dim()
    pieces = split_concat(source.dims[axis], [out.shape[axis] for out in call.out])
    for out, piece in zip(call.out, pieces, strict=True):
        call.set([*source.dims[:axis], piece, *source.dims[axis + 1 :]], out, source.index_of)


@rule("select", "select_copy")
def select(call: Call) -> None:
    """Select one index of a dim: the dim is frozen unless an axis gives the index; the other dims pass."""
    source, axis = call.get("self"), call.dim()
    call.tracer.pick(source, axis, call["index"])
    call.set([*source.dims[:axis], *source.dims[axis + 1 :]], index_of=source.index_of)


@rule("unbind")
def unbind(call: Call) -> None:
    source, axis = call.get("self"), call.dim()
    freeze(source.dims[axis], FIXED_INDEX)
    for out in call.out:
        call.set([*source.dims[:axis], *source.dims[axis + 1 :]], out, source.index_of)


@rule("cat", "concat", "concatenate")
def cat(call: Call) -> None:
    # A tensor of shape (0,) may be joined to anything: an empty cache.
    sources = [call.tracer.lookup(t) for t in call["tensors"] if t.ndim == call.out.ndim and t.numel()]
    axis = (call["dim"] or 0) % call.out.ndim
    dims = list(sources[0].dims)
    for other in sources[1:]:
        for i, dim in enumerate(other.dims):
            if i != axis:
                unify(dims[i], dim)
    dims[axis] = concat([s.dims[axis] for s in sources])
    call.set(dims, index_of=_joined_choices(call, sources, axis))


def _joined_choices(call: Call, sources: list[Traced], axis: int) -> Dim | None:
    """Return the axis that joined indices point into, if all of them point into one: the choices of a router that takes
    the largest score, then the largest of the others."""
    pointed = [source.index_of for source in sources if source.index_of is not None]
    if len(pointed) < len(sources) or len(set(map(size_of, pointed))) != 1:
        return None
    first = pointed[0]
    for other in pointed[1:]:
        unify(first, other)
    tag(first, top_k_tag(call.out.shape[axis], size_of(first)))
    return first


@rule("stack")
def stack(call: Call) -> None:
    sources = [call.tracer.lookup(t) for t in call["tensors"]]
    axis = (call["dim"] or 0) % call.out.ndim
    dims = list(sources[0].dims)
    for other in sources[1:]:
        for a, b in zip(dims, other.dims, strict=True):
            unify(a, b)
    dims.insert(axis, fresh(len(sources), "made by stacking"))
    call.set(dims)


@rule("flip", "roll")
def reorder(call: Call) -> None:
    dims = call.dims("self")
    for axis in call["dims"] or range(len(dims)):
        freeze(dims[axis], "its indices are reordered")
    call.set(dims)


@rule("constant_pad_nd", "pad")
def pad(call: Call) -> None:
    dims = list(call.dims("self"))
    amounts = call["pad"]
    for i in range(len(amounts) // 2):
        axis, before, after = len(dims) - 1 - i, amounts[2 * i], amounts[2 * i + 1]
        if before == after == 0:
            continue
        if before < 0 or after < 0:
            sizes = [max(-before, 0), 0, max(-after, 0)]
            sizes[1] = call.get("self").tensor.shape[axis] - sum(sizes)
            dims[axis] = split_concat(dims[axis], sizes)[1]
        ends = [[fresh(n)] if n > 0 else [] for n in (before, after)]
        dims[axis] = concat([*ends[0], dims[axis], *ends[1]])
    call.set(dims)


@rule("unfold", "as_strided", "diagonal")
def windows(call: Call) -> None:
    reason = f"seen through {call.func.overloadpacket.__name__}"
    for dim in call.dims("self"):
        freeze(dim, reason)
    call.set([fresh(n, reason) for n in call.out.shape])


@rule("tril", "triu")
def triangle(call: Call) -> None:
    for dim in call.dims("self")[-2:]:
        freeze(dim, "a triangle of it is cut")
    call.set(call.dims("self"))
