"""What is trained of a pruned model: adapters of its linear layers and stacked experts, by peft, or all weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..arguments import listed
from ..errors import PrunerError
from ..logs import log
from .arguments import RecoverArguments

LINEAR = (nn.Linear, Conv1D)


def trainable(args: RecoverArguments, model: PreTrainedModel) -> Any:
    """The model with what is to be trained: an adapter, or all of it.

    Raises:
        PrunerError: there is no such layer, or one is narrower than the rank.
    """
    model.config.use_cache = False
    if args.method not in ("lora", "dora"):
        return model.requires_grad_(True).train()
    from peft import LoraConfig, TaskType, get_peft_model

    linear, stacked = _chosen(args, model)
    layers, weights = _for_peft(model, sorted({_last(name) for name in linear}))
    parameters = [*weights, *sorted({".".join(name.split(".")[-2:]) for name in stacked})]
    dropout = args.lora_dropout
    if parameters and args.method == "dora":
        log.info("dora adapts linear layers alone: %s stay as they are", ", ".join(parameters))
        parameters = []
    if parameters and dropout:
        log.info("without dropout, which adapters of experts' parameters (%s) cannot have", ", ".join(parameters))
        dropout = 0.0
    config = LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=dropout,
        target_modules=layers,
        target_parameters=parameters or None,
        # Of the same name as one that is adapted, but not to be.
        exclude_modules=[name for name, _ in _linear(model) if _last(name) in layers and name not in linear] or None,
        use_dora=args.method == "dora",
        bias="none",
        task_type=TaskType.SEQ_2_SEQ_LM if model.config.is_encoder_decoder else TaskType.CAUSAL_LM,
    )
    if args.gradient_checkpointing:
        model.enable_input_require_grads()
    found = get_peft_model(model, config)
    if Path(args.prune_model).is_dir():  # so that the adapter finds it from anywhere; a hub id is its own name
        found.peft_config["default"].base_model_name_or_path = str(Path(args.prune_model).resolve())
    return found


def _chosen(args: RecoverArguments, model: PreTrainedModel) -> tuple[list[str], list[str]]:
    """The linear layers that get an adapter, and the parameters that hold a matrix of every expert."""
    head = model.get_output_embeddings()
    linear = {
        name: tuple(cast(torch.Tensor, module.weight).shape)
        for name, module in _linear(model)
        # A layer that gives something else than a product, such as a router, cannot have a product added.
        if module is not head and type(module).forward in [kind.forward for kind in LINEAR]
    }
    stacked = {
        f"{path}.{name}": tuple(parameter.shape[1:])
        for path, module in model.named_modules()
        if "expert" in f"{path} {type(module).__name__}".lower() and not isinstance(module, LINEAR)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3 and min(parameter.shape) > 1
    }
    asked = listed(args.lora_target_modules)
    if head is not None and asked:  # the head only by name
        linear |= {name: tuple(module.weight.shape) for name, module in _linear(model) if module is head}
    known = sorted({_last(name) for name in linear | stacked})
    for name in asked:
        if name not in known:
            raise PrunerError(f"--lora_target_modules: the model has no linear layer {name}; it has {', '.join(known)}")
    for name, shape in (linear | stacked).items():
        if args.lora_r > min(shape) and (not asked or _last(name) in asked):
            raise PrunerError(f"--lora_r {args.lora_r} is more than {name} {list(shape)} is wide: lower it")
    here, there = ([name for name in found if not asked or _last(name) in asked] for found in (linear, stacked))
    return here, there


def _linear(model: PreTrainedModel) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LINEAR)]


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _for_peft(model: PreTrainedModel, layers: list[str]) -> tuple[list[str], list[str]]:
    """The layers by name, and those by weight whose names peft takes for the experts' of an older transformers."""
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    taken = LoraConfig(target_modules=list(layers))
    convert_peft_config_for_transformers(taken, model, None)
    left = [name for name in layers if name in (taken.target_modules or ())]
    return left, [f"{name}.weight" for name in layers if name not in left]
