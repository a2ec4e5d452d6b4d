"""Operators that do a whole block at once: norms, attention, convolution, recurrence."""

from __future__ import annotations

from ..axes import flag, freeze, fresh, size_of, tag, unify
from ..call import Call, rule
from .layout import reshape


@rule("native_layer_norm", "layer_norm", "_fused_rms_norm", "rms_norm")
def layer_norm(call: Call) -> None:
    dims = call.dims("input")
    normalized = dims[len(dims) - len(call["normalized_shape"]) :]
    for name in ("weight", "bias"):
        if call[name] is not None:
            for dim, theirs in zip(normalized, call.dims(name), strict=True):
                unify(dim, theirs)
    for dim in normalized:
        flag(dim, "norm")
    outs = call.out if isinstance(call.out, tuple) else (call.out,)
    call.set(dims, outs[0])
    for statistic in outs[1:]:
        if statistic is not None:
            call.set([d if n > 1 else () for d, n in zip(dims, statistic.shape, strict=False)], statistic)


@rule("native_group_norm", "group_norm")
def group_norm(call: Call) -> None:
    """Normalise each group of channels alone: channels are ``group x within``."""
    dims, groups = call.dims("input"), call["group"] or call["num_groups"]
    for name in ("weight", "bias"):
        if call[name] is not None:
            unify(dims[1], call.dims(name)[0])
    _, within = reshape([dims[1]], (groups, size_of(dims[1]) // groups))
    for dim in (within, *dims[2:]):
        flag(dim, "norm")
    outs = call.out if isinstance(call.out, tuple) else (call.out,)
    call.set(dims, outs[0])


@rule("convolution", "conv1d", "_convolution", "mkldnn_convolution")
def convolution(call: Call) -> None:
    """Map the channels of a convolution: depthwise couples them, full ones act as projections.

    Grouped and transposed convolutions are frozen.
    """
    dims, weight, groups = call.dims("input"), call.dims("weight"), call["groups"] or 1
    channels = size_of(dims[1])
    for dim in weight[2:]:
        freeze(dim, "the window of a convolution")
    if call["transposed"]:
        for dim in (dims[1], *weight[:2], *([] if call["bias"] is None else [call.dims("bias")[0]])):
            freeze(dim, "transposed convolution")
        call.set([dims[0], *(fresh(n, "transposed convolution") for n in call.out.shape[1:])])
        return
    if groups == 1:
        unify(dims[1], weight[1])
    elif groups == channels == size_of(weight[0]):
        unify(dims[1], weight[0])
    else:
        for dim in (dims[1], *weight[:2]):
            freeze(dim, "grouped convolution")
    if call["bias"] is not None:
        unify(weight[0], call.dims("bias")[0])
    tag(dims[1], "mixing")
    tag(weight[0], "mixing")
    same = [d if size_of(d) == n else fresh(n) for d, n in zip(dims[2:], call.out.shape[2:], strict=True)]
    call.set([dims[0], weight[0], *same])


@rule(
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_attention_math",
    "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_fused_attention_overrideable",
    "scaled_dot_product_attention", "_scaled_dot_product_attention_math_for_mps",
)  # fmt: skip
def attention(call: Call) -> None:
    """``softmax(q k^T) v`` with shapes ``[batch, heads, positions, head_dim]``."""
    query, key, value = call.dims("query"), call.dims("key"), call.dims("value")
    for other in (key, value):
        for q, o in zip(query[:-2], other[:-2], strict=True):
            if size_of(q) == size_of(o):
                unify(q, o)
            elif size_of(o) > 1:  # grouped: query head = (key-value head, member)
                unify(reshape([q], (size_of(o), size_of(q) // size_of(o)))[0], o)
    unify(query[-1], key[-1])
    flag(query[-1], "scale")
    unify(key[-2], value[-2])
    mask = next((call[n] for n in ("attn_mask", "attn_bias") if call[n] is not None), None)
    if mask is not None:
        scores = [*query[:-1], key[-2]]
        for dim, theirs in zip(scores[::-1], call.tracer.lookup(mask).dims[::-1], strict=False):
            if theirs:
                unify(dim, theirs)
    for dim in query[:-2]:
        tag(dim, "attention")
    for dim in (query[-1], value[-1]):
        tag(dim, "mixing")
    outs = call.out if isinstance(call.out, tuple) else (call.out,)
    call.set([*query[:-1], value[-1]], outs[0])
