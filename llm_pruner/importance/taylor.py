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

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from ..errors import PrunerError
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
    salience: Salience = defaultdict(lambda: torch.zeros(()))
    hessian: dict[str, torch.Tensor] = {}
    samples = len(calibration)

    def per_sample(name: str, weight: torch.Tensor, gradient: torch.Tensor) -> None:
        squared = gradient.square() / samples
        if variant == "param_mix":  # |a - b| needs both per weight
            hessian[name] = hessian[name].add_(squared) if name in hessian else squared
            return
        value = weight.square() * squared  # W H W is a sum over samples, so channels are enough
        for dim in slices[name]:
            salience[name, dim] = salience[name, dim] + reduce_to(dim, value).cpu()

    def whole_batch(name: str, weight: torch.Tensor, gradient: torch.Tensor) -> None:
        value = weight * gradient
        if variant == "param_mix":
            value -= 0.5 * weight.square() * hessian.pop(name)
        for dim in slices[name]:
            salience[name, dim] = (
                reduce_to(dim, value).abs() if variant == "vectorize" else reduce_to(dim, value.abs())
            ).cpu()

    if variant in ("param_second", "param_mix"):
        for sample in calibration:
            backward(model, slices, sample[None], per_sample)
    if variant != "param_second":
        backward(model, slices, calibration, whole_batch)
    return dict(salience)


Visit = Callable[[str, torch.Tensor, torch.Tensor], None]


def backward(model: nn.Module, wanted: Slices, ids: torch.Tensor, visit: Visit) -> float:
    """One backward pass of the mean token loss; ``visit(name, weight, gradient)`` sees each gradient once, in fp32.

    Returns the loss. Gradients are freed as they are visited; the model's own ``requires_grad`` flags, mode
    and gradients are as before afterwards.
    """
    with _only(model, wanted, visit), torch.enable_grad():
        inputs = {"input_ids": ids, "labels": ids}
        loss = model(**inputs, use_cache=False).loss
        if not torch.isfinite(loss):
            raise PrunerError(f"the calibration loss is {loss.item()}; load the model with --dtype float32 or bfloat16")
        loss.backward()
    return loss.item()


@contextmanager
def _only(model: nn.Module, wanted: Slices, visit: Visit) -> Iterator[None]:
    def hook(name: str) -> Callable[[torch.Tensor], None]:
        def ready(parameter: torch.Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None
            with torch.no_grad():
                if not torch.isfinite(gradient).all():
                    raise PrunerError(
                        f"the gradient of {name} is not finite; load the model with --dtype float32 or bfloat16"
                    )
                visit(name, parameter.detach().float(), gradient.float())

        return ready

    named = dict(model.named_parameters())
    saved = [(p, p.requires_grad, p.grad) for p in named.values()]
    training = [m for m in model.modules() if m.training]
    with ExitStack() as stack:
        try:
            model.eval()
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
            for module in training:
                module.training = True
