"""Read the arguments that modules were constructed with: configs, sizes, fields."""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from .per_layer import bind_constructor, parts_of


def constructor_arguments(module: nn.Module) -> dict[str, Any] | None:
    """Return the arguments that a module was constructed with, by name; None if they were not recorded."""
    if "_constructed_with" not in module.__dict__:
        return None
    module_class, args, kwargs = module.__dict__["_constructed_with"]
    return dict(list(bind_constructor(module_class, args, kwargs).arguments.items())[1:])


def config_of(module: nn.Module) -> PreTrainedConfig | None:
    """Return the config that a module was constructed from, if any."""
    values = (constructor_arguments(module) or {}).values()
    return next((v for v in values if isinstance(v, PreTrainedConfig)), None)


def numbers_of(module: nn.Module) -> dict[str, int]:
    """Return the sizes that a module was constructed from beside its config: ``num_heads`` of BART's attention."""
    arguments = constructor_arguments(module) or {}
    return {
        name: value
        for name, value in arguments.items()
        if isinstance(value, int) and not isinstance(value, bool) and not re.search("idx|index|layer", name)
    }


def fields_of(config: PreTrainedConfig | None) -> dict[str, Any]:
    """Return the fields of a config, and those of the configs inside it as ``ffn_config.ffn_hidden_size``."""
    by_name: dict[str, Any] = {}
    for name, value in (vars(config) if config else {}).items():
        if isinstance(value, PreTrainedConfig):
            by_name |= {f"{name}.{inner}": v for inner, v in fields_of(value).items()}
        elif not name.startswith("_"):
            by_name[name] = value
    return by_name


def refusal(config: PreTrainedConfig) -> str:
    """Return why a config, or one inside it, refuses its own values, "" if it does not."""
    try:
        for part in parts_of(config):
            part.validate()
    except Exception as error:  # validators raise what they like
        return " ".join(str(error).split())
    return ""
