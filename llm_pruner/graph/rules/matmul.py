"""Contractions: the contracted axes are one, the batch axes are one, the others pass."""

from __future__ import annotations

from ..axes import Dim, flag, freeze, tag, unify
from ..call import Call, rule
from .pointwise import broadcast


def contract(call: Call, a: str, b: str) -> list[Dim]:
    """``[..., m, k] @ [..., k, n] -> [..., m, n]``."""
    left, right = call.get(a), call.get(b)
    *batch, rows, inner = left.dims
    *batch_right, inner_right, columns = right.dims
    unify(inner, inner_right)
    for x, y in zip(batch, batch_right, strict=True):
        unify(x, y)
    if left.role == right.role == "activation":  # tokens meet tokens: no plain projection
        for dim in (rows, inner, columns, *batch):
            tag(dim, "mixing")
        flag(inner, "scale")  # scores are divided by a root of its size, which a smaller config changes
    return [*[x or y for x, y in zip(batch, batch_right, strict=True)], rows, columns]


@rule("mm", "bmm")
def matmul(call: Call) -> None:
    call.set(contract(call, "self", "mat2"))


@rule("addmm", "baddbmm")
def matmul_with_bias(call: Call) -> None:
    b = ("mat1", "mat2") if "mat1" in call.args else ("batch1", "batch2")
    dims = contract(call, *b)
    call.set(broadcast([dims, call.dims("self")], len(dims)))


@rule("mv", "addmv")
def matrix_times_vector(call: Call) -> None:
    matrix, vector = ("mat", "vec") if "mat" in call.args else ("self", "vec")
    rows, inner = call.dims(matrix)
    unify(inner, call.dims(vector)[0])
    call.set(broadcast([[rows], call.dims("self")], 1) if matrix == "mat" else [rows])


@rule("dot", "vdot")
def dot(call: Call) -> None:
    unify(call.dims("self")[0], call.dims("tensor" if "tensor" in call.args else "other")[0])
    call.set([])


@rule("linalg_solve_triangular")
def solve_triangular(call: Call) -> None:
    """``A^-1 B``, or with ``left=False`` ``B A^-1``: the solved axis has an order, the others pass."""
    *batch, rows, inner = call.dims("self")
    *batch_right, left, right = call.dims("B")
    for dim in (rows, inner, right if call["left"] is False else left):
        freeze(dim, "solved in order")
    merged = broadcast([batch, batch_right], max(len(batch), len(batch_right)))
    call.set([*merged, left, right])
