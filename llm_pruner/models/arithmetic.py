"""Precision of matrix products: bfloat16 where a device is faster at it, float32 where digits count."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from .torch_internals import multiplies_bfloat16


def narrow_arithmetic(device: torch.device) -> AbstractContextManager[None]:
    """Return a context that multiplies matrices in bfloat16 where the device is faster at that.

    Weights, sums and the residual stream stay in float32.
    """
    if not multiplies_bfloat16(device):
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)  # a cache would outlive changes of weights


def exact_arithmetic(device: torch.device) -> AbstractContextManager[None]:
    """Return a context within :func:`narrow_arithmetic` that multiplies matrices in their own dtype."""
    return torch.autocast(device.type, enabled=False)
