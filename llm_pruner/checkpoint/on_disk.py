"""Tensors in memory-mapped files, so that a model may be larger than memory."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from ..errors import PrunerError

BLOCK = bytes(2**22)
CAN_UNLINK_OPEN = os.name == "posix"  # a mapped file may lose its name


def on_disk(folder: str | Path) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function that moves a tensor to a file of its own in ``folder`` and memory-maps it from there.

    The files have no names, so that their space is freed with the tensors, even if the process is killed. Windows keeps
    the name of a mapped file: there, the files lie in the system's temporary folder and are removed after the tensors.

    Raises:
        PrunerError: (when a tensor is placed) the disk is full or the folder cannot be written.
    """

    def place(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.numel() or tensor.device.type != "cpu":
            return tensor
        try:
            descriptor, name = tempfile.mkstemp(prefix=".tensor.", dir=folder if CAN_UNLINK_OPEN else None)
            try:
                _reserve(descriptor, tensor.nbytes)
                mapped = torch.from_file(name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
            finally:
                os.close(descriptor)
                if CAN_UNLINK_OPEN:
                    os.unlink(name)
        except OSError as error:
            needed = tensor.nbytes / 2**30
            raise PrunerError(f"cannot put {needed:.2f} GiB into {folder}: {error.strerror or error}") from error
        if not CAN_UNLINK_OPEN:
            weakref.finalize(mapped.untyped_storage(), _remove, name)
        return mapped.view(tensor.shape).copy_(tensor)

    return place


def _reserve(descriptor: int, size: int) -> None:
    """Take space for a file now: a full disk then shows as an error, not as a crash when a mapped page is written."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
        return
    with os.fdopen(os.dup(descriptor), "wb") as file:
        for start in range(0, size, len(BLOCK)):
            file.write(BLOCK[: size - start])


def _remove(name: str) -> None:
    with suppress(OSError):  # still mapped
        os.unlink(name)
