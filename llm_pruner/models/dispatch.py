"""Place a model on devices."""

from __future__ import annotations

import psutil
import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import PrunerError
from .blockwise import StandIns


def resolve_device(value: str, name: str) -> str:
    """Return the device that a flag means: ``auto`` is the first of CUDA, MPS and the CPU that exists.

    Args:
        name: of the flag or argument, for messages.

    Raises:
        PrunerError: the device does not exist here.
    """
    if value == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    check_device(value, name)
    return value


def check_device(device: str | torch.device, name: str) -> None:
    """Refuse a device that does not exist here or cannot hold weights.

    Raises:
        PrunerError: with the ``name`` of the flag or argument.
    """
    try:
        parsed = torch.device(device)
    except RuntimeError as error:
        raise PrunerError(f"{name} {device!r} is not valid: give cpu, cuda, cuda:N or mps") from error
    if parsed.type == "meta":
        raise PrunerError(f"{name} {device!r} holds no weights: give cpu, cuda, cuda:N or mps")
    if parsed.type == "cuda" and (parsed.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        available = f"the last CUDA device here is cuda:{count - 1}" if count else "there is no CUDA device here"
        raise PrunerError(f"{name} {device}: {available}; give {name} cpu")
    if parsed.type == "mps" and not torch.backends.mps.is_available():
        raise PrunerError(f"{name} {device}: there is no MPS device here; give {name} cpu")


def free_bytes(device: str | torch.device) -> int:
    """Return the memory that is free on a device, of the whole machine where the device has none of its own."""
    device = torch.device(device)
    return int(torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available)


def spread(model: PreTrainedModel, room: dict[torch.device, float] | None = None) -> PreTrainedModel:
    """Move a model's layers to GPUs, filling one after the other; layers that do not fit stay where they are.

    Embeddings and head go to the first GPU. Layers compute where they lie, and layers on the CPU on the first GPU
    (:func:`llm_pruner.models.blockwise.computing`).

    Args:
        room: bytes to fill of each device (default: 45% of every GPU's free memory, which leaves as much for a pruned
            copy and a tenth for activations).
    """
    if room is None:
        devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
        room = {device: 0.45 * torch.cuda.mem_get_info(device)[0] for device in devices}
    if not room:
        return model
    blocks = list(StandIns(model, lambda _, tensor: tensor).blocks.values())
    inside = {id(module) for block in blocks for module in block.modules()}
    devices, main = list(room), next(iter(room))
    room = dict(room)
    rest = [module for module in model.modules() if id(module) not in inside]
    room[main] -= _move(rest, main)
    for block in blocks:
        size = sum(t.nbytes for t in [*block.parameters(), *block.buffers()])
        while devices and size > room[devices[0]]:
            devices.pop(0)
        if not devices:
            break
        room[devices[0]] -= _move(list(block.modules()), devices[0])
    return model


def _move(modules: list[nn.Module], device: torch.device) -> int:
    """Move the modules' own tensors, not those of modules inside them; return the parameters' bytes."""
    moved: dict[int, nn.Parameter] = {}  # tied parameters stay tied
    for module in modules:
        for key, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in moved:
                    moved[id(parameter)] = nn.Parameter(parameter.detach().to(device), parameter.requires_grad)
                module._parameters[key] = moved[id(parameter)]
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = buffer.to(device)
    return sum(parameter.nbytes for parameter in moved.values())
