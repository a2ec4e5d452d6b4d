"""Precision of matrix products: bfloat16 where a device is faster at it, float32 where digits count."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from ..errors import PrunerError, in_one_line
from .torch_internals import multiplies_bfloat16


@contextmanager
def narrow_arithmetic(device: torch.device) -> Iterator[None]:
    """Multiply matrices in bfloat16 where the device is faster at that.

    Weights, sums and the residual stream stay in float32.

    Raises:
        PrunerError: the code of the model writes such products into float32 tensors, as DBRX's does.
    """
    if not multiplies_bfloat16(device):
        yield
        return
    try:
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):  # its cache would outlive weights
            yield
    except RuntimeError as error:
        if "BFloat16" not in str(error):
            raise
        raise PrunerError(
            f"this model does not run with products in bfloat16 ({in_one_line(error)}): give --dtype float32"
        ) from error


def in_float64(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor in float64; on the CPU if its device has no such numbers, as Apple's GPUs have none."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def exact_arithmetic(device: torch.device) -> AbstractContextManager[None]:
    """Return a context within :func:`narrow_arithmetic` that multiplies matrices in their own dtype."""
    return torch.autocast(device.type, enabled=False)
