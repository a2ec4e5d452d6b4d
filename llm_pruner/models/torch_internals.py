"""Private parts of torch that the package uses, in one place; checked on torch 2.13."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["TorchDispatchMode", "multiplies_bfloat16", "storage_key", "tree_leaves", "tree_map", "without_modes"]

without_modes = _disable_current_modes  # a context in which no dispatch mode sees the operators


def storage_key(tensor: torch.Tensor) -> int:
    """Return a number that tensors share if they are views of one storage, for as long as one of them lives."""
    return tensor.untyped_storage()._cdata


def multiplies_bfloat16(device: torch.device) -> bool:
    """Return True if a device has instructions that multiply bfloat16, and is faster at these than at float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
