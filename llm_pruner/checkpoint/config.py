"""Load configs and build models without weights."""

from __future__ import annotations

from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from ..errors import PrunerError
from ..logs import log
from ..models.tasks import ask_for, auto_model_class
from .bounds import bounded_construction, check_counts
from .gguf_reader import parsed_once
from .locate import explain, locate


def load_config(name: str, trust_remote_code: bool = False, *, task: str | None = None) -> PreTrainedConfig:
    """Load the config alone, of any model that :func:`llm_pruner.load` takes, or from a ``config.json`` file.

    Args:
        task: let the config declare the class of this task instead of its own.

    Raises:
        PrunerError: the model does not exist, its config cannot be read, or it has no class for the task.
    """
    config = _read_config(name, trust_remote_code)
    ask_for(task, config)
    return config


def checked_config(name: str, path: str, **options: Any) -> PreTrainedConfig:
    """Read the config of a folder or hub repository, after its numbers of layers and the like.

    Raises:
        PrunerError: a number is beyond all models; other errors are those of transformers.
    """
    check_counts(name, PreTrainedConfig.get_config_dict(path, **options)[0])
    return AutoConfig.from_pretrained(path, **options)


def _read_config(name: str, trust_remote_code: bool) -> PreTrainedConfig:
    path, gguf = locate(name)
    try:
        if gguf:
            status = (Path(path) / gguf).stat()
            return deepcopy(_gguf_config(path, gguf, status.st_size, status.st_mtime_ns))
        config = checked_config(name, path, trust_remote_code=trust_remote_code)
        config.__dict__.pop("quantization_config", None)  # of the files, not of the model that is made of them
        return config
    except PrunerError:
        raise
    except Exception as error:
        raise PrunerError(explain(name, path, error)) from error


@lru_cache(maxsize=8)
def _gguf_config(folder: str, file: str, size: int, modified: int) -> PreTrainedConfig:
    """Return the config in a GGUF file; a file of the same size and time is parsed once."""
    with parsed_once():
        config = AutoConfig.from_pretrained(folder, gguf_file=file)
    config.__dict__.pop("quantization_config", None)
    return config


def untie(config: PreTrainedConfig, name: str) -> None:
    """Let a config say that head and embeddings are two tensors, and log it."""
    log.warning("%s: its config ties head and embeddings, and its files hold both: they stay apart", name)
    for one in (config, config.get_text_config()):
        if getattr(one, "tie_word_embeddings", False):
            one.tie_word_embeddings = False


def meta_model(config: PreTrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """Build a model without weights, on the meta device.

    Raises:
        PrunerError: no model can be built from the config.
    """
    name = config.name_or_path or type(config).__name__
    try:
        with torch.device("meta"), bounded_construction(name):
            model = auto_model_class(config).from_config(config, trust_remote_code=trust_remote_code).eval()
    except PrunerError:
        raise
    except Exception as error:  # constructors raise what they like
        raise PrunerError(explain(name, "", error)) from error
    for module in model.modules():  # weight norms, for one, make their parameters on the CPU
        for name, parameter in module._parameters.items():
            if parameter is not None and not parameter.is_meta:
                module._parameters[name] = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
    return model
