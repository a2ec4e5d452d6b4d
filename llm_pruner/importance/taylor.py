"""Taylor importance: how much the loss changes when a slice is removed (LLM-Pruner, arXiv 2305.11627, section 3.2).

With W a weight, g the gradient of the mean token loss over the whole calibration batch and H the diagonal
of the Fisher information, (1/N) sum_n g_n^2 over N samples taken one at a time, a slice is worth

    vectorize      | sum W g |                   (equation 3, first order, the slice as one vector)
    param_first    sum | W g |                   (equation 5, first order, element by element)
    param_second   sum | W H W |
    param_mix      sum | W g - 1/2 W H W |       (equation 5 with its second-order term)

Every parameter is reduced to its few numbers per channel the moment its gradient is ready, and the gradient
is freed, so gradients never live all at once. Parameters that no unit needs get none.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..errors import PrunerError
from ..graph import evaluating, layer_lists, model_inputs, predicted
from .aggregate import reduce_to

VARIANTS = ("vectorize", "param_first", "param_second", "param_mix")
Slices = dict[str, list[int]]
Salience = dict[tuple[str, int], torch.Tensor]


def taylor(model: nn.Module, slices: Slices, calibration: torch.Tensor, variant: str) -> Salience:
    """Taylor importance of every channel: ``{(parameter, dim): [size of the dim]}`` in fp32.

    Args:
        slices: the dims wanted of each parameter.
        calibration: LongTensor ``[samples, tokens]``.
        variant: one of :data:`VARIANTS`.

    Raises:
        PrunerError: a gradient is not finite; the message names the parameter.
    """
    salience: Salience = {}
    hessian: dict[str, torch.Tensor] = {}
    samples = len(calibration)

    def add(name: str, value: torch.Tensor, signed: bool = False) -> None:
        for dim in slices[name]:
            channels = reduce_to(dim, value).cpu()
            if not torch.isfinite(channels).all():
                raise PrunerError(
                    f"the gradient of {name} is not finite; load the model with --dtype float32 or bfloat16"
                )
            key = name, dim
            salience[key] = salience.get(key, 0) + (channels.abs() if signed else channels)

    def per_sample(name: str, weight: torch.Tensor, gradient: torch.Tensor) -> None:
        if variant == "param_mix":  # |a - b| needs both per weight
            squared = gradient.square().div_(samples)
            hessian[name] = hessian[name].add_(squared) if name in hessian else squared
        else:  # W H W is a sum over samples of non-negative terms, so channels are enough
            add(name, (weight * gradient).square_().div_(samples))

    def whole_batch(name: str, weight: torch.Tensor, gradient: torch.Tensor) -> None:
        value = weight * gradient
        if variant == "param_mix":
            value -= 0.5 * weight.square() * hessian.pop(name)
        add(name, value if variant == "vectorize" else value.abs_(), signed=variant == "vectorize")

    if variant in ("param_second", "param_mix"):
        for sample in calibration:
            backward(model, slices, sample[None], per_sample)
    if variant != "param_second":
        backward(model, slices, calibration, whole_batch)
    return salience


Visit = Callable[[str, torch.Tensor, torch.Tensor], None]


def backward(model: nn.Module, wanted: Slices, ids: torch.Tensor, visit: Visit) -> float:
    """One backward pass of the mean token loss; ``visit(name, weight, gradient)`` sees each gradient once, in fp32.

    Returns the loss. Gradients are freed as they are visited; the model's own ``requires_grad`` flags, mode
    and gradients are as before afterwards.
    """
    with _only(model, wanted, visit), recomputing(model), torch.enable_grad():
        inputs = model_inputs(model, ids)
        logits = model(**inputs, use_cache=False).logits
        loss, _ = NextTokenLoss.apply(logits.clone() if logits._is_view() else logits, predicted(inputs))
        if not torch.isfinite(loss):
            raise PrunerError(f"the calibration loss is {loss.item()}; load the model with --dtype float32 or bfloat16")
        loss.backward()
    return loss.item()


class NextTokenLoss(torch.autograd.Function):
    """Mean cross entropy of tokens 1.. given those before them, in the memory of the logits.

    With a large vocabulary the logits are the largest tensor of the whole pass, and a plain cross entropy
    keeps three of them. Here their gradient, (softmax - onehot) / tokens, is written over them.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = ids.shape[0] * (ids.shape[1] - 1)
        total = torch.zeros((), dtype=torch.float64)
        for row, target in zip(logits, ids[:, 1:].to(logits.device), strict=True):  # one sample at a time in fp32
            log_probabilities = row[:-1].float().log_softmax(-1)
            total -= log_probabilities.gather(-1, target[:, None]).sum().double().cpu()
            gradient = log_probabilities.exp_()
            gradient.scatter_add_(-1, target[:, None], torch.full_like(gradient[:, :1], -1.0).expand(-1, 1))
            row[:-1] = gradient / tokens
            row[-1] = 0
        ctx.mark_dirty(logits)
        ctx.save_for_backward(logits)
        return (total / tokens).to(logits.device, torch.float32), logits

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (logits_gradient,) = ctx.saved_tensors
        return logits_gradient.mul_(gradients[0].to(logits_gradient.dtype)), None  # used once: nobody sees it again


@contextmanager
def recomputing(model: nn.Module) -> Iterator[None]:
    """Recompute the activations of each decoder layer in the backward pass instead of keeping them.

    That costs the layers' forward pass once more. What is saved elsewhere, the gradients of embeddings and head,
    nearly makes up for it; ``benchmarks/scoring.py`` measures both.
    """
    layers = [layer for stack in layer_lists(model).values() for layer in stack]
    try:
        for layer in layers:
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
        _return_freed_memory()
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)  # the class's own shows again


def _return_freed_memory(threshold: int = 8 << 20) -> None:
    """Make glibc hand large freed tensors back to the system instead of keeping them for later.

    Left to itself it raises this threshold to the largest tensor freed so far, and the heap grows by the
    fragments: a quarter of a GiB here.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").mallopt(-3, threshold)  # -3 is M_MMAP_THRESHOLD


@contextmanager
def _only(model: nn.Module, wanted: Slices, visit: Visit) -> Iterator[None]:
    def hook(name: str) -> Callable[[torch.Tensor], None]:
        def ready(parameter: torch.Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None
            with torch.no_grad():
                visit(name, parameter.detach().float(), gradient.float())

        return ready

    named = dict(model.named_parameters())
    saved = [(p, p.requires_grad, p.grad) for p in named.values()]
    with evaluating(model), ExitStack() as stack:
        try:
            for name, parameter in named.items():
                parameter.grad = None
                parameter.requires_grad_(name in wanted)
                if name in wanted:
                    stack.callback(parameter.register_post_accumulate_grad_hook(hook(name)).remove)
            yield
        finally:
            for parameter, flag, gradient in saved:
                parameter.requires_grad_(flag)
                parameter.grad = gradient
