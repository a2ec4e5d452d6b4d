"""Bring the models of several runs together: each once, with its method and all its measurements."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..evaluation.names import short_names
from .runs import MeasuredModel, Run

STAGES = ("evaluated", "original", "vocabulary", "pruned", "recovered")  # a later one says more about a model
ORIGINAL = "original"
TARGETS = ("target_params", "target_macs", "target_memory", "target_latency")
SHAPES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers")
# Flags of a pruning that say what the method's name and the size say, or nothing about the result.
OTHER_FLAGS = {
    *("model", "base_model", "pruner_type", "taylor", "preset", "pruning_ratio", "seed", "calib_seed", "output"),
    *("output_root", "save_ckpt_log_name", "save_model", "device", "eval_device", "quiet", "score_cache"),
    *("num_layers", "drop_layers", "depth", "drop_attention", "drop_mlp", "num_attention", "num_mlp", "target_config"),
    *(*TARGETS, *SHAPES),
}

# Refits of the presets, with those of earlier versions.
REFITS = {"best": ("lora", "distill", "least_squares"), "fast": ("lora", "ridge")}


def merge_models(runs: Iterable[Run]) -> list[MeasuredModel]:
    """Return every model once, each original before what was made from it, stages in order."""
    runs = list(runs)
    folders = {str(run.folder.resolve()): run for run in runs if any(_is_made_by(run, m) for m in run.models)}
    merged: dict[str, MeasuredModel] = {}
    for model in (model for run in runs for model in run.models):
        identity = _identify(model.model, folders)
        parent = _identify(model.parent, folders) if model.parent else ""
        kl = {text: (kl, error, _identify(other, folders)) for text, (kl, error, other) in model.kl.items()}
        model = replace(model, model=identity, parent=parent, kl=kl)
        merged[identity] = _combine(merged[identity], model) if identity in merged else model
    shorts = short_names(merged)
    different = _differing_flags(m.arguments for m in merged.values() if m.stage == "pruned")
    described = {}
    stages = [run.name for run in folders.values() if run.is_stage]
    for identity, model in merged.items():
        run = folders.get(identity)
        model = _describe(model, run.name if run else shorts[identity], merged, different)
        if run and run.is_stage and stages.count(run.name) > 1:  # the points of a sweep
            seed = "" if model.seed is None else f", seed {model.seed}"
            model = replace(model, name=f"{model.method} {model.size}{seed}")
        described[identity] = model
    of_sweep = {identity: m for identity, m in described.items() if m.name.startswith(f"{m.method} ")}
    by_argument = sorted(of_sweep.items(), key=lambda item: (item[1].method, _number(item[1].size), item[1].name))
    return _in_order({i: m for i, m in described.items() if i not in of_sweep} | dict(by_argument))


def _is_made_by(run: Run, model: MeasuredModel) -> bool:
    return model.model == str(run.folder)


def _identify(name: str, folders: Iterable[str]) -> str:
    """Return the folder of a model, absolute; a merged adapter is the model of its run."""
    path = Path(name)
    path = path.parent if path.name == "merged" else path
    if path.is_dir():
        return str(path.resolve())
    ends = [folder for folder in folders if len(path.parts) > 1 and folder.endswith(f"/{path}")]
    return ends[0] if len(ends) == 1 else str(path)


def _combine(one: MeasuredModel, other: MeasuredModel) -> MeasuredModel:
    """Join the measurements of a model by two runs; if both measured the same quantity, the later one counts."""
    first, last = sorted((one, other), key=lambda model: STAGES.index(model.stage))
    return replace(
        last,
        parent=last.parent or first.parent,
        arguments=last.arguments or first.arguments,
        speeds=one.speeds | other.speeds,
        perplexity=one.perplexity | other.perplexity,
        byte_perplexity=one.byte_perplexity | other.byte_perplexity,
        kl=one.kl | other.kl,
        questions=one.questions | other.questions,
        generation=one.generation or other.generation,
        **{
            name: getattr(one, name) if getattr(other, name) is None else getattr(other, name)
            for name in ("parameters", "macs", "weight_bytes", "accuracy", "accuracy_error")
        },
    )


def _describe(
    model: MeasuredModel, name: str, models: Mapping[str, MeasuredModel], different: list[str]
) -> MeasuredModel:
    """Fill in name, method, size and seed."""
    chain = [model]
    while chain[-1].parent in models and len(chain) <= len(models):
        chain.append(models[chain[-1].parent])
    made = [one for one in reversed(chain) if one.arguments]
    sizes = [size for one in made if one.stage == "pruned" and (size := _size(one.arguments))]
    seeds = [one.arguments.get("seed") for one in made if one.arguments.get("seed") is not None]
    method = " + ".join(_method(one, different) for one in made)
    if not made:
        method = ORIGINAL if model.stage == ORIGINAL else name
    return replace(model, name=name, method=method, size=", ".join(sizes), seed=seeds[0] if seeds else None)


def _method(model: MeasuredModel, different: list[str]) -> str:
    flags = model.arguments
    if model.stage == "recovered":
        return str(flags.get("method", "recovered"))
    if model.stage == "vocabulary":
        return "vocabulary"
    criterion = flags.get("pruner_type") or "pruned"
    if criterion == "taylor":
        criterion = flags.get("taylor") or criterion
    refit = flags.get("refit", flags.get("compensate"))
    if criterion == "param_second" and refit in REFITS.get(flags.get("preset", ""), ()):
        criterion = f"preset {flags['preset']}"
    if flags.get("num_layers") or flags.get("drop_layers"):
        criterion = f"layers by {flags['depth']}" if flags.get("depth") else "layers"
    return ", ".join([criterion, *(f"{name} {_text(flags.get(name))}" for name in different)])


def _size(flags: Mapping[str, Any]) -> str:
    """Return the size that a pruning was asked for, in words."""
    for name in TARGETS:
        if flags.get(name):
            return str(flags[name])
    if flags.get("num_layers"):
        return f"{_text(flags['num_layers'])} layers"
    if flags.get("drop_layers"):
        return f"without layers {_text(flags['drop_layers'])}"
    shapes = [f"{name} {flags[name]}" for name in SHAPES if flags.get(name)]
    return ", ".join(shapes) if shapes else str(flags.get("pruning_ratio", ""))


def _number(size: str) -> tuple[float, str]:
    try:
        return float(size), size
    except ValueError:
        return math.inf, size


def _differing_flags(arguments: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the flags of prunings, beyond criterion, size and seed, that differ within a criterion."""
    values: dict[tuple[Any, ...], dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for flags in arguments:
        criterion = (flags.get("preset"), flags.get("pruner_type"), flags.get("taylor"), bool(flags.get("num_layers")))
        for name, value in flags.items():
            if name not in OTHER_FLAGS:
                values[criterion][name].add(_text(value))
    names = dict.fromkeys(name for flags in values.values() for name, texts in flags.items() if len(texts) > 1)
    return list(names)


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _in_order(models: Mapping[str, MeasuredModel]) -> list[MeasuredModel]:
    """Return models so that each follows the one that it was made from."""
    children: dict[str, list[str]] = defaultdict(list)
    for identity, model in models.items():
        children[model.parent if model.parent in models and model.parent != identity else ""].append(identity)
    ordered: dict[str, MeasuredModel] = {}

    def visit(identity: str) -> None:
        if identity not in ordered:
            ordered[identity] = models[identity]
            for child in children[identity]:
                visit(child)

    for identity in (*children[""], *models):  # records of a circle, edited by hand, come last
        visit(identity)
    return list(ordered.values())
