"""Refuse configs that describe far more than their files can hold, before memory is taken for it.

A config of a few bytes can ask for a billion layers, or for a vocabulary of which the files hold nothing, which loaders
would fill with random numbers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from ..errors import PrunerError
from ..hub import cached_file
from .locate import weight_files

MOST_COUNT = 100_000  # of layers, experts or labels
COUNTED = re.compile(r"(^|_)(layers?|blocks?|depths?|experts|labels)$")
MOST_MODULES = 600_000  # remote code of 60 layers with 384 experts each makes 115,000, built up to four times
# Parameters per byte of the weight files: 5 where they have 1.6 bits, and as many again where layers are built in their
# full widths before they are cut.
PARAMETERS_PER_BYTE, SPARE_PARAMETERS = 64, 2**24


def check_counts(name: str, config: Mapping[str, Any]) -> None:
    """Refuse a config with impossible numbers of layers, experts or labels, which constructors count up to.

    Raises:
        PrunerError: a number is beyond all models; the message names its field.
    """
    for field, value in config.items():
        if isinstance(value, dict):
            check_counts(name, value)
        elif COUNTED.search(field) and isinstance(value, int) and value > MOST_COUNT:
            raise PrunerError(f"{name}: its config has {field} {value:.6g}; more than {MOST_COUNT:,} are not read")


@contextmanager
def bounded_construction(name: str, files: Callable[[], int | None] | None = None) -> Iterator[None]:
    """Refuse to build more modules, or more parameters, than a checkpoint can be of, within the block.

    Args:
        name: name of the model, for the message.
        files: returns the bytes of its weight files, None if they are not known; left out where no memory is taken.

    Raises:
        PrunerError: a constructor goes beyond.
    """
    modules = count(1)
    parameters, most = 0, None if files else math.inf

    def count_module(module: nn.Module, _: str, child: nn.Module) -> None:
        if next(modules) > MOST_MODULES:
            raise PrunerError(f"{name}: its config describes more than {MOST_MODULES:,} modules: it is damaged")

    def count_parameters(module: nn.Module, field: str, parameter: nn.Parameter) -> None:
        nonlocal parameters, most
        parameters += parameter.numel()
        if files and most is None and parameters > SPARE_PARAMETERS:  # by now the hub's files are here
            stored = files()
            most = math.inf if stored is None else PARAMETERS_PER_BYTE * stored + SPARE_PARAMETERS
        if most is not None and parameters > most:
            raise PrunerError(
                f"{name}: its config describes more than {parameters:.3g} parameters (up to {field} of a "
                f"{type(module).__name__}), and its files are far too small for them: one of them is damaged"
            )

    hooks = [
        register_module_module_registration_hook(count_module),
        register_module_parameter_registration_hook(count_parameters),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def weight_file_bytes(path: str, gguf: str | None, revision: str) -> int | None:
    """Return the bytes of a model's weight files.

    Args:
        path: folder or hub id.
        gguf: name of its GGUF file.
        revision: branch, tag or commit of a hub repository.

    Returns:
        None for a model that is not on this machine yet.
    """
    folder = Path(path)
    if not folder.is_dir():
        config = cached_file(path, "config.json", revision)
        if config is None:
            return None
        folder = config.parent
    return sum(file.stat().st_size for file in weight_files(folder, gguf))
