"""Tensors that live in files, so that a model may be larger than memory."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from ..errors import PrunerError


def on_disk(folder: str | Path) -> Callable[[torch.Tensor], torch.Tensor]:
    """A place for tensors: each is moved to a file of its own in ``folder`` and mapped from there.

    The files have no names, so that nothing is left behind, whatever happens: their space is free again when the
    tensors are gone.

    Raises:
        PrunerError: (when a tensor is placed) the disk is full or the folder cannot be written.
    """

    def place(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.numel() or tensor.device.type != "cpu":
            return tensor
        try:
            descriptor, name = tempfile.mkstemp(prefix=".tensor.", dir=folder)
            try:
                os.posix_fallocate(descriptor, 0, tensor.nbytes)  # a full disk shows here, not as a crash later
                mapped = torch.from_file(name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
            finally:
                os.close(descriptor)
                os.unlink(name)
        except OSError as error:
            needed = tensor.nbytes / 2**30
            raise PrunerError(f"cannot put {needed:.2f} GiB into {folder}: {error.strerror or error}") from error
        return mapped.view(tensor.shape).copy_(tensor)

    return place
