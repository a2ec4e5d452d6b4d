"""Tensors that the system may move to disk, for calibration sets whose hidden states do not fit in memory."""

from __future__ import annotations

import mmap
import tempfile

import torch


def mapped(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of a tensor on the CPU whose memory is a temporary file's.

    The file is in the folder that ``TMPDIR`` names, has no name of its own where the system can do without, and is
    gone with the tensor.

    >>> mapped(torch.arange(3))
    tensor([0, 1, 2])
    """
    if not tensor.nbytes:
        return tensor.cpu()
    with tempfile.TemporaryFile() as file:
        file.truncate(tensor.nbytes)
        memory = mmap.mmap(file.fileno(), tensor.nbytes)
    return torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape).copy_(tensor.detach())
