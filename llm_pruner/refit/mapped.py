"""Tensors that the system may move to disk, for calibration sets whose hidden states do not fit in memory."""

from __future__ import annotations

import math
import mmap
import tempfile
from collections.abc import Sequence

import torch


def mapped(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of a tensor on the CPU whose memory is a temporary file's.

    The file is in the folder that ``TMPDIR`` names, has no name of its own where the system can do without, and is
    gone with the tensor.

    >>> mapped(torch.arange(3))
    tensor([0, 1, 2])
    """
    return mapped_space(tensor.shape, tensor.dtype).copy_(tensor.detach())


def mapped_space(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor of zeros on the CPU whose memory is a temporary file's, as :func:`mapped` describes.

    >>> mapped_space((2, 3), torch.float32).sum()
    tensor(0.)
    """
    size = math.prod(shape) * dtype.itemsize
    if not size:
        return torch.zeros(*shape, dtype=dtype)
    with tempfile.TemporaryFile() as file:
        file.truncate(size)
        memory = mmap.mmap(file.fileno(), size)
    return torch.frombuffer(memory, dtype=dtype).view(*shape)
