"""Several processes that share a calibration set, as torchrun starts them: one to a GPU, or to a few CPU cores.

Each process has the whole model and computes on its own share of the samples. What adds up over samples (gradients,
their squares, the sums of a regression) is averaged over the processes, so all of them come to the same result, which
is that of one process but for rounding. In a process that torchrun did not start, everything here does nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from ..errors import PrunerError
from ..logs import started_processes
from .inputs import Inputs

PATIENCE = timedelta(days=2)  # one process measures and saves while the others wait


@contextmanager
def joined(device: str) -> Iterator[None]:
    """Join the other processes that torchrun started; ``device`` is where the models compute."""
    if started_processes() == 1 or dist.is_initialized():
        yield
        return
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


def count() -> int:
    """Return the number of processes that compute together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process among them, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def own_share(inputs: Inputs) -> Inputs:
    """Return the samples that fall to this process.

    Raises:
        PrunerError: the processes cannot have equally many.
    """
    processes = count()
    if processes == 1:
        return inputs
    samples, left_over = divmod(len(inputs), processes)
    if left_over:
        raise PrunerError(
            f"{processes} processes cannot have equal shares of {len(inputs)} calibration samples: start 2, 4 or 8 "
            "processes, and give a multiple of 8 samples"
        )
    return inputs[rank() * samples : (rank() + 1) * samples]


def averaged(tensor: torch.Tensor) -> torch.Tensor:
    """Replace a tensor, in place, by its mean over the processes; return it."""
    if count() > 1:
        total = tensor.contiguous()
        dist.all_reduce(total)
        tensor.copy_(total / count())
    return tensor


def mean_of(value: float) -> float:
    """Return the mean of a number over the processes."""
    return averaged(torch.tensor(value, dtype=torch.float64)).item() if count() > 1 else value


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensors of all processes, of one shape, one after the other along their first dim."""
    if count() == 1:
        return tensor
    parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(count())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def from_first(tensor: torch.Tensor) -> torch.Tensor:
    """Replace a tensor, in place, by that of the first process; return it."""
    if count() > 1:
        dist.broadcast(tensor, src=0)
    return tensor
