"""Operators that make tensors out of nothing, and out of nothing but a shape.

A tensor filled with one value is the same for every index of every axis, so its dims are free to become
whatever they meet (the accumulators of mixture-of-experts layers are). ``arange`` and its kin are not:
they have no rule here, are met as constants, and a constant freezes what it is combined with.
"""

from __future__ import annotations

from ..axes import fresh
from ..call import Call, rule


@rule(
    "zeros", "ones", "full", "empty", "zeros_like", "ones_like", "full_like", "empty_like",
    "new_zeros", "new_ones", "new_full", "new_empty", "empty_strided", "new_empty_strided",
    "scalar_tensor", "rand", "randn", "rand_like", "randn_like", "bernoulli",
)  # fmt: skip
def uniform(call: Call) -> None:
    call.set([fresh(n) for n in call.out.shape])


@rule("fill", "fill_", "zero_", "uniform_", "normal_", "bernoulli_")
def overwrite(call: Call) -> None:
    call.set(call.dims("self"))
