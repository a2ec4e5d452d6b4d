"""Operators that work index by index: all inputs are indexed together, with broadcasting."""

from __future__ import annotations

from ..axes import Dim, tag, unify
from ..call import Call, rule, tensors_in

# A non-linearity between two projections is what makes an axis one of neurons.
ACTIVATIONS = {
    "celu", "elu", "expm1", "gelu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "log_sigmoid_forward",
    "mish", "relu", "relu6", "selu", "sigmoid", "silu", "softplus", "square", "tanh", "threshold", "where",
}  # fmt: skip
# Index by index, though torch does not tag them so.
UNTAGGED = (
    "floor_divide", "masked_fill", "masked_fill_", "polar", "log_sigmoid_forward", "lift_fresh", "copy_",
    "_to_copy", "clone", "alias", "detach", "contiguous", "view_as_real_copy", "nan_to_num", "clamp",
    "dropout", "native_dropout", "complex", "_conj", "_neg_view", "clamp_min", "clamp_max", "where",
)  # fmt: skip


def broadcast(operands: list[list[Dim]], rank: int) -> list[Dim]:
    """Unify dims aligned from the right; a size-1 dim (the empty product) gives way to any other."""
    out: list[Dim] = [()] * rank
    for dims in operands:
        for i, dim in enumerate(dims, start=rank - len(dims)):
            if out[i] and dim:
                unify(out[i], dim)
            out[i] = out[i] or dim
    return out


@rule(*UNTAGGED)
def pointwise(call: Call) -> None:
    name = call.func.overloadpacket.__name__
    outs = list(tensors_in(call.out))
    dims = broadcast([t.dims for t in call.traced_inputs], outs[0].ndim)
    if name.rstrip("_") in ACTIVATIONS:
        for dim in dims:
            tag(dim, "activation")
    if name.endswith("_") and not name.startswith("_"):  # written into its first operand: its dims stay
        dims = call.traced_inputs[0].dims
    indices = [t.index_of for t in call.traced_inputs if t.index_of]
    for out in outs:
        if out.shape == outs[0].shape:
            call.set(dims, out, indices[0] if indices else None)
