"""Decide whether models that are compared can be loaded at the same time, to be timed in turns."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..checkpoint.config import load_config, meta_model
from ..checkpoint.load import torch_dtype
from ..checkpoint.locate import base_of, is_adapter, locate
from ..errors import PrunerError
from ..logs import log
from ..models.dispatch import free_bytes
from ..models.skeleton import parameter_count
from .tabular import short_bytes

SHARE = 0.5  # of the free memory, for all weights; the rest is for activations, caches and samples
ONE_BY_ONE = "models are timed one after the other"


def fit_together(
    names: Sequence[str],
    *,
    dtype: str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
    task: str | None = None,
) -> bool:
    """Return True if the weights of all models together take at most half of the device's free memory.

    Only configs are read. Where the answer is no, a line of the log says why.
    """
    needed = 0
    for name in names:
        try:
            needed += weight_bytes(name, dtype, trust_remote_code, task=task)
        except PrunerError:  # loading says what is wrong with a model
            log.info("%s: the size of %s is known only once it is loaded", ONE_BY_ONE, name)
            return False
    free = free_bytes(device)
    if needed <= SHARE * free:
        return True
    log.info("%s: together they need %s, and %s are free", ONE_BY_ONE, short_bytes(needed), short_bytes(free))
    return False


def weight_bytes(name: str, dtype: str, trust_remote_code: bool = False, *, task: str | None = None) -> int:
    """Return the bytes that a model's weights take once it is loaded, from its config.

    Raises:
        PrunerError: the config cannot be read, or no model can be built from it.
    """
    path, gguf = locate(name)
    if is_adapter(path):  # merged into its base
        return weight_bytes(base_of(path), dtype, trust_remote_code, task=task)
    config = load_config(name, trust_remote_code, task=task)
    model = meta_model(config, trust_remote_code)
    given = torch.float32 if gguf and dtype == "auto" else torch_dtype(dtype)
    if isinstance(given, torch.dtype):
        return parameter_count(model) * given.itemsize
    return sum(parameter.nbytes for parameter in model.parameters())
