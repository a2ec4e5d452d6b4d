"""Log the last lines of a run: the folder and size of its model, and commands to load, serve and improve it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedConfig

from ..errors import PrunerError
from ..logs import inside_another_run, log
from ..models.per_layer import has_per_layer_widths
from ..models.skeleton import parameter_count
from ..models.tasks import FEATURES, OF_TOKENS, TEXT_GENERATION, TEXT_TO_TEXT, declared_class, task_of_config
from ..surgery.uniform import uniform_config
from .checking import needs_tokenizer
from .config import load_config, meta_model
from .engines import BESIDE_VLLM, why_not_vllm
from .locate import base_of, is_adapter
from .standalone import FILE


def log_next_steps(
    folder: Path, command: str, *, original: str = "", compare: Sequence[str] = (), trust_remote_code: bool = False
) -> None:
    """Log the last lines of a run that wrote a model; a stage of another run logs none.

    Args:
        folder: complete folder of the model or adapter.
        command: name of the command that wrote it.
        original: name of the unpruned model, "" if it is not known.
        compare: further models to compare with.
        trust_remote_code: run modelling code that comes with the checkpoint.
    """
    if inside_another_run():
        return
    try:
        lines = next_steps(folder, command, original=original, compare=compare, trust_remote_code=trust_remote_code)
    except PrunerError:  # a config that cannot be read without its code is no reason to fail after the work
        lines = [f"model: {folder}"]
    for line in lines:
        log.info("%s", line)


def next_steps(
    folder: Path, command: str, *, original: str = "", compare: Sequence[str] = (), trust_remote_code: bool = False
) -> list[str]:
    """Return the lines of :func:`log_next_steps`: model, load, serve and next."""
    model = base_of(folder) if is_adapter(folder) else str(folder)
    config = load_config(model, trust_remote_code)
    whose = f"those of {original}" if command == "to-uniform" else "the original's"
    declared, before = _declared_and_read(original, config, trust_remote_code)
    lines = [f"model: {folder}{_size(config, before, whose, trust_remote_code)}", f"load:  {_loading(folder, config)}"]
    lines.append(f"serve: {_serving(folder, config)}")
    if command in ("prune", "apply") and task_of_config(config).name in OF_TOKENS:
        lines.append(f"next:  llm-pruner recover {_words(folder, _beside('tune_log', folder))} --merge")
    else:
        models = dict.fromkeys(str(one) for one in (original, *compare, folder) if one)
        asked_for = declared and before and declared_class(before) == declared_class(config) != declared
        task = f" --task {task_of_config(config).name}" if asked_for else ""
        lines.append(f"next:  llm-pruner evaluate {_words(*models)}{task}")
    return lines


def _declared_and_read(name: str, like: PreTrainedConfig, trust: bool) -> tuple[str | None, PreTrainedConfig | None]:
    """Return the class that a model declares, and its config as both are counted: with the class of ``like``, and with
    a head of its own where ``like`` has one, since files may hold a head that their config ties.

    The config is None for a model that is not at hand.
    """
    try:
        config = load_config(name, trust) if name else None
    except PrunerError:
        return None, None
    if config is None:
        return None, None
    declared = declared_class(config)
    if config.model_type == like.model_type and like.architectures:
        config.architectures = like.architectures
        if getattr(config.get_text_config(), "tie_word_embeddings", None) is not None:
            config.get_text_config().tie_word_embeddings = like.get_text_config().tie_word_embeddings
    return declared, config


def _size(config: PreTrainedConfig, original: PreTrainedConfig | None, whose: str, trust_remote_code: bool) -> str:
    """Return the parameters in words, and their ratio to the original's where that can be read."""
    after, before = (_count_parameters(one, trust_remote_code) for one in (config, original))
    if after is None:
        return ""
    share = f", {after / before:.3f} times {whose}, {before:,}" if before else ""
    return f" ({after:,} parameters{share})"


def _count_parameters(config: PreTrainedConfig | None, trust_remote_code: bool) -> int | None:
    """Count parameters by a model's config; None for a model that is not at hand."""
    try:
        return None if config is None else parameter_count(meta_model(config, trust_remote_code))
    except PrunerError:
        return None


def _loading(folder: Path, config: PreTrainedConfig) -> str:
    """Return the line of Python that loads the model."""
    if is_adapter(folder):
        return f"import llm_pruner; model, tokenizer = llm_pruner.load({_quoted(folder)})"
    name, carries_code = task_of_config(config).auto_class, bool(getattr(config, "auto_map", None))
    importing = "import llm_pruner; " if has_per_layer_widths(config) and not (folder / FILE).is_file() else ""
    trust = ", trust_remote_code=True" if carries_code else ""
    return f"{importing}from transformers import {name}; model = {name}.from_pretrained({_quoted(folder)}{trust})"


def _serving(folder: Path, config: PreTrainedConfig) -> str:
    """Return the command that serves the model: vLLM where it can, else the page of ``llm-pruner chat``."""
    steps, served = [], folder
    task = task_of_config(config).name
    if task != TEXT_GENERATION:
        if task == TEXT_TO_TEXT:
            return f"llm-pruner chat {_words(folder)}"
        pipeline = task_of_config(config).pipeline
        pipeline = pipeline if needs_tokenizer(config) or task != FEATURES else "image-feature-extraction"
        return f'pipeline("{pipeline}", {_quoted(folder)}) of transformers'
    if why_not_vllm(config.get_text_config()) and not _can_be_uniform(config):
        return f"llm-pruner chat {_words(folder)}"
    if is_adapter(folder):
        served = _beside(folder.parent, folder, "-merged")
        merge = f"import llm_pruner as lp; lp.save(*lp.load({_quoted(folder)}), {_quoted(served)})"
        steps.append(f"python -c {shlex.quote(merge)}")
    differs = has_per_layer_widths(config)
    if differs and (padded := bool(why_not_vllm(config.get_text_config()))):
        source, served = served, _beside(served.parent, served, "-uniform")
        steps.append(f"llm-pruner to-uniform {_words(source, served)}")
        differs = not padded
    foreign = getattr(config, "auto_map", None) and not (folder / FILE).is_file()
    serving = f"vllm serve {_words(served)}" + (" --trust-remote-code" if foreign else "")
    return " && ".join([*steps, serving]) + (f"  # with {BESIDE_VLLM}" if differs else "")


def _can_be_uniform(config: PreTrainedConfig) -> bool:
    try:
        return not has_per_layer_widths(config) or uniform_config(config) is not None
    except PrunerError:
        return False


def _beside(parent: str | Path, folder: Path, ending: str = "") -> Path:
    return Path(parent) / f"{folder.name}{ending}"


def _words(*parts: str | Path) -> str:
    return shlex.join(map(str, parts))


def _quoted(folder: Path) -> str:
    return json.dumps(str(folder))
