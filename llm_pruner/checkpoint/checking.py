"""Refuse models that do not exist or are incomplete, by their configs and the names of their files."""

from __future__ import annotations

from pathlib import Path

import transformers
from transformers import PreTrainedConfig

from ..errors import PrunerError, Unavailable
from ..files import check_folder
from ..inputs import InputCheck
from ..models.tasks import OF_TOKENS, ask_for, declared_class, task_of_config
from .arguments import UniformArguments
from .config import load_config
from .load import TOKENIZERS, no_tokenizer
from .locate import base_of, fetch_quantized, is_adapter, locate
from .quantized.registry import open_shards
from .shards import INDEX, shard_files


def check_model(
    name: str, trust_remote_code: bool = False, *, tokenizer: bool = False, task: str | None = None
) -> PreTrainedConfig:
    """Refuse a model that cannot be loaded, without reading a weight; return its config.

    Args:
        task: load the class of this task instead of the declared class.
        tokenizer: refuse the folder of a model that reads text without one.

    Raises:
        PrunerError: the model does not exist, or its folder lacks weights or a tokenizer.
    """
    path, gguf = locate(name)
    if Path(path).is_file():
        raise Unavailable(f"{name} is a config alone: give a model with weights")
    if is_adapter(path):
        return check_model(base_of(path), trust_remote_code, tokenizer=tokenizer, task=task)
    on_hub = gguf is None and not Path(name).expanduser().exists()
    try:
        config = load_config(name, trust_remote_code)
    except PrunerError as error:
        raise (Unavailable if on_hub else PrunerError)(str(error)) from error
    ask_for(task, config)
    if gguf or (on_hub and not fetch_quantized(name)):
        return config
    path, _ = locate(name)
    if not any(Path(path).glob("*.safetensors")):
        raise Unavailable(
            f"{name} holds no safetensors weights; pickles are never read: convert it to safetensors first"
        )
    if (Path(path) / INDEX).is_file():
        shard_files(Path(path))
    open_shards(name, Path(path))
    if tokenizer and needs_tokenizer(config) and not any(any(Path(path).glob(pattern)) for pattern in TOKENIZERS):
        raise no_tokenizer(name)
    return config


def needs_tokenizer(config: PreTrainedConfig) -> bool:
    """Return True if the class that a config declares reads text."""
    model_class = getattr(transformers, declared_class(config) or "", None)
    return getattr(model_class, "main_input_name", "input_ids") == "input_ids"


def check_language_model(config: PreTrainedConfig, name: str, needed_by: str) -> None:
    """Refuse a model that does not predict tokens.

    Args:
        needed_by: flag or command, for the error.

    Raises:
        PrunerError: the config declares another class.
    """
    if task_of_config(config).name not in OF_TOKENS:
        raise PrunerError(f"{needed_by} needs a language model, and {name} is a {declared_class(config)}")


def check_later_language_model(check: InputCheck, needed_by: str, trust_remote_code: bool = False) -> None:
    """Refuse a model that earlier stages of a recipe write, if the model that they start from predicts no tokens.

    Raises:
        PrunerError: as :func:`check_language_model`.
    """
    if check.origin is None:
        return
    try:
        config = load_config(check.origin, trust_remote_code, task=check.task)
    except PrunerError:  # the first stage says what is wrong with it
        return
    check_language_model(config, check.origin, needed_by)


def check_uniform_inputs(arguments: UniformArguments, check: InputCheck) -> None:
    """Refuse models and folders that ``llm-pruner to-uniform`` cannot use."""
    if not check.skips(arguments.model):
        with check.flag("model", arguments.model):
            check_model(arguments.model, arguments.trust_remote_code)
    with check.flag("output", arguments.output):
        if not check.skips(arguments.output):
            check_folder(arguments.output, "config.json", arguments.model)
