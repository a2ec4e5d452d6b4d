"""Load the model of a pruning run, or share it between runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoint.config import load_config, meta_model
from ..checkpoint.load import load, torch_dtype
from ..checkpoint.locate import locate
from ..logs import log
from ..models.dispatch import free_bytes
from ..models.skeleton import parameter_count
from .settings import ModelSettings

_kept: dict[ModelSettings, Any] | None = None  # model loaded last, inside keeping_model


@contextmanager
def keeping_model() -> Iterator[None]:
    """Share one loaded model between the runs inside, one after the other; none of them changes it."""
    global _kept
    _kept = {}
    try:
        yield
    finally:
        _kept = None


def load_or_reuse(settings: ModelSettings, scratch: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load a model and its tokenizer, or return those that :func:`keeping_model` shares.

    Args:
        scratch: folder for the weights of a quantized model that is offloaded.
    """
    if _kept is not None and settings in _kept:
        return _kept[settings]
    if _kept is not None:
        _kept.clear()  # before the next model takes memory
    upcast = settings.dtype == "auto" and settings.device == "cpu" and not settings.offload
    loaded = load(
        settings.name,
        "float32" if upcast else settings.dtype,
        "cpu" if settings.offload else settings.device,
        settings.trust_remote_code,
        device_map=settings.device_map,
        task=settings.task,
        offload_folder=scratch if settings.offload else None,
    )
    if _kept is not None:
        _kept[settings] = loaded
    return loaded


def is_too_large(settings: ModelSettings) -> bool:
    """Return True if original and pruned weights do not fit side by side, so that the model must be offloaded."""
    if locate(settings.name)[1] is not None:  # GGUF: nothing to map, it is dequantized in memory
        return False
    trust = settings.trust_remote_code
    meta = meta_model(load_config(settings.name, trust, task=settings.task), trust)
    dtype = torch_dtype(settings.dtype)
    if not isinstance(dtype, torch.dtype):
        dtype = torch.float32 if settings.device == "cpu" else meta.dtype
    needed = 2 * dtype.itemsize * parameter_count(meta)
    free = free_bytes(settings.device)
    if needed > free:
        log.info(
            "offloading: the model and its pruned copy take %.1f GiB, %.1f are free on %s",
            needed / 2**30,
            free / 2**30,
            settings.device,
        )
    return needed > free
