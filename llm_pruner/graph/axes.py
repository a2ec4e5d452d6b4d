"""The algebra of axes: the parts of a tensor's dimensions, and their equality.

A *dim* is an ordered product of :class:`Atom` objects, row-major, outermost first: the 576 rows of a
query projection may be ``(key-value head 3, query head in its group 3, head_dim 64)``. A dim of size 1
is the empty product, so broadcasting needs no special case.

An atom is a *leaf* until something looks inside it. Then it is *refined*, once and for good, into

* a **product** (``view`` turns 576 into 9 x 64), or
* a **concatenation** (``chunk`` turns a fused 2n into n + n).

``unify`` indexes two dims together from now on. It takes the common refinement of both sides, so the order in which
a model's operators run does not matter. Three facts travel with a leaf and survive every merge and refinement: the
reason why it is *frozen* (None when it is free), its *flags* (reasons why removal differs from zeroing, such as
``norm``: an operator normalises over it) and its *tags* (the operators that saw it, from which
:mod:`llm_pruner.graph.units` reads the kind).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from math import prod
from typing import Any

import torch


class Atom:
    """One segment of an axis. Compare with ``is`` after :func:`find`; ``size`` never changes."""

    __slots__ = ("concatenated", "flags", "frozen", "parent", "parts", "size", "tags")

    def __init__(self, size: int, frozen: str | None = None):
        self.size = size
        self.parent: Atom | None = None
        self.parts: tuple[Atom, ...] = ()
        self.concatenated = False
        self.frozen = frozen
        self.flags: set[str] = set()
        self.tags: set[str] = set()

    def __repr__(self) -> str:
        atom = find(self)
        if not atom.parts:
            return f"{atom.size}{'*' if atom.frozen else ''}"
        return "(" + (" + " if atom.concatenated else " x ").join(map(repr, atom.parts)) + ")"


Dim = tuple[Atom, ...]


def fresh(size: int, frozen: str | None = None) -> Dim:
    """Return a new dim of one atom; the empty product when ``size`` is 1.

    >>> fresh(12), fresh(1), fresh(3, frozen="because")
    ((12,), (), (3*,))
    """
    return () if size == 1 else (Atom(size, frozen),)


def find(atom: Atom) -> Atom:
    """Return the representative of ``atom`` (union-find with path halving)."""
    while atom.parent is not None:
        if atom.parent.parent is not None:
            atom.parent = atom.parent.parent
        atom = atom.parent
    return atom


def flatten(dim: Iterable[Atom]) -> list[Atom]:
    """Return the representatives of a dim with every product opened: leaves and concatenations only."""
    out: list[Atom] = []
    for atom in dim:
        atom = find(atom)
        if atom.parts and not atom.concatenated:
            out.extend(flatten(atom.parts))
        elif atom.size > 1:
            out.append(atom)
    return out


def leaves(dim: Iterable[Atom]) -> list[Atom]:
    """Return every leaf below a dim, each once, in order of first appearance."""
    seen: dict[int, Atom] = {}
    stack = list(dim)[::-1]
    while stack:
        atom = find(stack.pop())
        if atom.parts:
            stack.extend(reversed(atom.parts))
        else:
            seen.setdefault(id(atom), atom)
    return list(seen.values())


def size_of(dim: Iterable[Atom]) -> int:
    """Return the number of indices of a dim."""
    return prod(atom.size for atom in dim)


def freeze(dim: Iterable[Atom], reason: str) -> None:
    """Mark every leaf below ``dim`` as not prunable; the first reason given is the one kept."""
    for leaf in leaves(dim):
        leaf.frozen = leaf.frozen or reason


def flag(dim: Iterable[Atom], name: str) -> None:
    """Note on every leaf below ``dim`` a reason why removing its indices differs from zeroing them."""
    for leaf in leaves(dim):
        leaf.flags.add(name)


def tag(dim: Iterable[Atom], name: str) -> None:
    """Note on every leaf below ``dim`` an operator that saw it."""
    for leaf in leaves(dim):
        leaf.tags.add(name)


def _inherit(child: Atom, parent: Atom) -> None:
    """Push what is known about a leaf down to an atom that takes its place."""
    for leaf in leaves((child,)):
        leaf.frozen = leaf.frozen or parent.frozen
        leaf.flags |= parent.flags
        leaf.tags |= parent.tags


def _refine(atom: Atom, sizes: Iterable[int], concatenated: bool) -> tuple[Atom, ...]:
    """Refine a leaf into parts of the given sizes."""
    parts = tuple(Atom(size) for size in sizes)
    for part in parts:
        _inherit(part, atom)
    atom.parts, atom.concatenated = parts, concatenated
    return parts


def split_product(atom: Atom, outer: int) -> tuple[Dim, Dim]:
    """Write ``atom`` as ``outer x rest`` and return both dims; an atom without such a form is frozen.

    >>> rows = fresh(12)  # of a projection: 3 heads of 4 channels
    >>> heads, channels = split_product(rows[0], 3)
    >>> rows, heads, channels
    (((3 x 4),), (3,), (4,))
    """
    atom = find(atom)
    sizes = outer, atom.size // outer
    if not atom.parts:
        first, second = _refine(atom, sizes, concatenated=False)
    else:
        form = Atom(atom.size)
        first, second = _refine(form, sizes, concatenated=False)
        _merge(atom, form)
    return (first,), (second,)


def split_concat(dim: Dim, sizes: list[int]) -> list[Dim]:
    """Cut a dim into consecutive pieces of the given sizes (zeros allowed) and return a dim per piece.

    A product can be cut along its outermost atom only; cut elsewhere it is frozen, and the pieces with it.

    >>> fused = fresh(10)  # gate and up in one projection
    >>> gate, up = split_concat(fused, [5, 5])
    >>> unify(gate, up)  # gate * up
    >>> fused, len(leaves(fused))
    (((5 + 5),), 1)
    """
    if len([s for s in sizes if s]) <= 1:
        return [dim if s else fresh(0) for s in sizes]
    atoms = flatten(dim)
    stride = size_of(atoms[1:])
    if any(s % stride for s in sizes):
        reason = f"cut into {sizes}, which is not a multiple of its inner {stride}"
        freeze(dim, reason)
        return [fresh(s, reason) for s in sizes]
    cuts = [s // stride for s in sizes if s]
    head = atoms[0]
    if head.parts:
        form = Atom(head.size)
        _refine(form, cuts, concatenated=True)
        unify((head,), (form,))
        pieces = iter(form.parts)
    else:
        pieces = iter(_refine(head, cuts, concatenated=True))
    return [((next(pieces), *atoms[1:]) if s else fresh(0)) for s in sizes]


def concat(dims: list[Dim]) -> Dim:
    """Return the dim that is the concatenation of ``dims``.

    >>> concat([fresh(2), fresh(3)])
    ((2 + 3),)
    """
    dims = [d for d in dims if size_of(d)]
    if len(dims) == 1:
        return dims[0]
    whole = Atom(sum(size_of(d) for d in dims))
    whole.parts, whole.concatenated = tuple(map(_as_atom, dims)), True
    return (whole,)


def unify(a: Dim, b: Dim) -> None:
    """Index dims ``a`` and ``b`` (of equal size) together from now on.

    >>> rows, columns = fresh(12), fresh(12)
    >>> heads, _ = split_product(rows[0], 3)
    >>> groups, _ = split_product(columns[0], 6)
    >>> unify(rows, columns)  # both are 3 x 2 x 2 now
    >>> [leaf.size for leaf in leaves(rows)], leaves(rows) == leaves(columns)
    ([3, 2, 2], True)

    Factors that do not divide each other cost the axes, never correctness:

    >>> a, b = fresh(6), fresh(6)
    >>> _, _ = split_product(a[0], 2), split_product(b[0], 3)
    >>> unify(a, b)
    >>> a
    ((2* x 3*),)
    """
    if not size_of(a):
        return
    left, right = flatten(a)[::-1], flatten(b)[::-1]
    while left and right:
        x, y = left.pop(), right.pop()
        if x.size == y.size:
            _merge(x, y)
            continue
        if x.size < y.size:
            left, right, x, y = right, left, y, x
        if x.size % y.size:
            reason = f"meets an axis of another factorisation ({x.size} against {y.size})"
            freeze([x, y, *left, *right], reason)
            return
        outer, rest = split_product(x, y.size)
        # The split may have refined what still waits on either side, so open both anew.
        unify((*outer, *rest, *reversed(left)), (y, *reversed(right)))
        return


def _merge(x: Atom, y: Atom) -> None:
    """Merge two atoms of equal size (representatives)."""
    x, y = find(x), find(y)
    if x is y:
        return
    if x.parts and y.parts:
        _merge_refined(x, y)
        return
    if x.parts:  # keep the refined one
        x, y = y, x
    _inherit(y, x)
    x.parent = y


def _merge_refined(x: Atom, y: Atom) -> None:
    if x.concatenated != y.concatenated:
        product, pieces = (y, x) if x.concatenated else (x, y)
        _merge_product_with_concat(product, pieces)
        return
    if not x.concatenated:
        unify(x.parts, y.parts)
    else:
        _merge_concats(x, y)
    if find(x) is not find(y):
        find(x).parent = find(y)


def _merge_concats(x: Atom, y: Atom) -> None:
    """Cut both at the union of their cut points, then merge piece by piece."""
    left, right = list(x.parts)[::-1], list(y.parts)[::-1]
    while left and right:
        a, b = left.pop(), right.pop()
        if a.size == b.size:
            unify((a,), (b,))
            continue
        longer, shorter, queue = (a, b, left) if a.size > b.size else (b, a, right)
        first, second = split_concat((longer,), [shorter.size, longer.size - shorter.size])
        unify(first, (shorter,))
        queue.append(_as_atom(second))


def _as_atom(dim: Dim) -> Atom:
    """Return a dim as one atom, for places that take only an atom: inside a concatenation."""
    if len(dim) == 1:
        return dim[0]
    whole = Atom(size_of(dim))
    if dim:
        whole.parts = dim
    return whole


def _merge_product_with_concat(product: Atom, pieces: Atom) -> None:
    """Merge ``outer x inner`` with ``p1 + p2 + ...``: the pieces are ``o1 x inner``, ``o2 x inner``, ...

    where the outer atom is the concatenation ``o1 + o2 + ...``. Piece and piece share ``inner``: index i
    of it is removed from all of them.
    """
    sizes = [part.size for part in pieces.parts]
    parts = pieces.parts
    for part, form in zip(parts, split_concat((product,), sizes), strict=True):
        unify((part,), form)
    if find(product) is not find(pieces):
        find(pieces).parent = find(product)


Form = tuple[Any, ...]  # of a dim: its products, concatenations and leaves, which are numbered as they are met


def labels(dim: Dim) -> dict[int, torch.Tensor]:
    """Return, for every leaf below ``dim``, the leaf's index to which each position of the dim belongs.

    The result is ``{id(leaf): LongTensor [size of dim]}``, with -1 where the leaf does not reach. A leaf that occurs
    twice in one product has no such map: its tensor is empty. Dims of one form share their tensors: large models have
    thousands of dims and few forms.

    >>> rows = fresh(6)
    >>> heads, channels = split_product(rows[0], 2)
    >>> labels(rows)[id(heads[0])], labels(rows)[id(channels[0])]
    (tensor([0, 0, 0, 1, 1, 1]), tensor([0, 1, 2, 0, 1, 2]))
    """
    numbers: dict[int, int] = {}
    label_by_number = _labels(_form(dim, numbers))
    return {leaf: label_by_number[number] for leaf, number in numbers.items()}


def _form(dim: Dim, numbers: dict[int, int]) -> Form:
    out: list[Any] = []
    for atom in dim:
        atom = find(atom)
        if not atom.parts:
            out.append((atom.size, numbers.setdefault(id(atom), len(numbers))))
        elif atom.concatenated:
            out.append((atom.size, tuple((part.size, _form((part,), numbers)) for part in atom.parts), "pieces"))
        else:
            out.append((atom.size, _form(atom.parts, numbers), "product"))
    return tuple(out)


@lru_cache(maxsize=4096)
def _labels(form: Form) -> dict[int, torch.Tensor]:
    """Return labels by the numbers of leaves."""
    total = prod(entry[0] for entry in form)
    out: dict[int, torch.Tensor] = {}
    position = torch.arange(total)
    stride = total
    for size, inside, *what in form:
        stride //= size
        local = (position // stride) % size
        if not what:
            found = {inside: torch.arange(size)}
        else:
            found = _labels(inside) if what == ["product"] else _in_pieces(size, inside)
        for leaf, inner in found.items():
            known = leaf in out or not inner.numel()
            out[leaf] = position[:0] if known else inner[local]
    return out


def _in_pieces(size: int, pieces: tuple[tuple[int, Form], ...]) -> dict[int, torch.Tensor]:
    out: dict[int, torch.Tensor] = {}
    start = 0
    for length, form in pieces:
        for leaf, inner in _labels(form).items():
            whole = out.setdefault(leaf, torch.full((size,), -1))
            if inner.numel() and whole.numel():
                whole[start : start + length] = inner
            else:
                out[leaf] = whole[:0]
        start += length
    return out
