"""Adapters by peft: on linear layers and on experts that are stacked in one parameter."""

from __future__ import annotations

from collections import Counter
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import PrunerError
from ..logs import log
from .settings import AdapterSettings

LINEAR = (nn.Linear, Conv1D)


def make_trainable(model: PreTrainedModel, adapter: AdapterSettings | None) -> Any:
    """Add an adapter to a model and freeze its own weights; without an adapter, train all weights.

    Raises:
        PrunerError: a layer of ``target_modules`` does not exist, or is narrower than the rank.
    """
    model.config.use_cache = False
    return model.requires_grad_(True).train() if adapter is None else _add_adapter(model, adapter)


def _add_adapter(model: PreTrainedModel, adapter: AdapterSettings) -> Any:
    modules, parameters = _choose_layers(model, adapter)
    dropout = adapter.dropout
    if not modules and (not parameters or adapter.method == "dora"):
        raise PrunerError("the model has no linear layer that an adapter can be added to: give --method full")
    if parameters and adapter.method == "dora":
        log.info("dora does not adapt %s", _short_names(parameters))
        parameters = []
    if parameters and dropout:
        log.info("--lora_dropout is 0: peft has none for adapters of %s", _short_names(parameters))
        dropout = 0.0
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=dropout,
        target_modules=modules,
        target_parameters=parameters or None,
        use_dora=adapter.method == "dora",
        bias="none",
        task_type=TaskType.SEQ_2_SEQ_LM if model.config.is_encoder_decoder else TaskType.CAUSAL_LM,
    )
    student = get_peft_model(model, config)
    if adapter.base_model:
        student.peft_config["default"].base_model_name_or_path = adapter.base_model
    return student


def _choose_layers(model: PreTrainedModel, adapter: AdapterSettings) -> tuple[list[str], list[str]]:
    """Return the modules to adapt and, by name, the parameters: stacked experts, and weights of some modules."""
    linear, stacked = _linear_layers(model, bool(adapter.target_modules)), _stacked_experts(model)
    modules, weights = _names_for_peft(model, list(linear))
    names = dict(zip([*modules, *stacked], [*modules, *stacked])) | {path: f"{path}.weight" for path in weights}
    available = sorted({_last_name(path) for path in names})
    for name in adapter.target_modules:
        if name not in available:
            raise PrunerError(
                f"--lora_target_modules: the model has no linear layer {name}; it has {', '.join(available)}"
            )
    shapes = linear | stacked
    chosen = [path for path in names if not adapter.target_modules or _last_name(path) in adapter.target_modules]
    for path in chosen:
        if adapter.rank > min(shapes[path]):
            raise PrunerError(
                f"--lora_r {adapter.rank} is more than {path} {list(shapes[path])} is wide: give {min(shapes[path])} "
                "or less"
            )
    return [path for path in chosen if path in modules], [names[path] for path in chosen if path not in modules]


def _linear_layers(model: PreTrainedModel, with_head: bool) -> dict[str, tuple[int, ...]]:
    """Return the shapes of linear layers to which an adapter's product can be added."""
    head, uses = model.get_output_embeddings(), _uses(model)
    return {
        path: tuple(cast(torch.Tensor, module.weight).shape)
        for path, module in model.named_modules()
        if isinstance(module, LINEAR)
        # Of a weight with several uses peft would adapt one, but merging changes all; the head is taken at one's word.
        and (with_head if module is head else uses[id(module.weight)] == 1)
        and _multiplies(module)
    }


def _stacked_experts(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Return the shapes of one expert's matrix in parameters that stack those of all experts."""
    uses = _uses(model)
    return {
        f"{path}.{name}": tuple(parameter.shape[1:])
        for path, module in model.named_modules()
        if "expert" in f"{path} {type(module).__name__}".lower() and not isinstance(module, LINEAR)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3 and uses[id(parameter)] == 1
    }


def _uses(model: PreTrainedModel) -> Counter[int]:
    return Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))


@torch.no_grad()
def _multiplies(module: Any) -> bool:
    """Return True if a layer returns only its product, to which an adapter's can be added; some routers do not."""
    if type(module).forward in [kind.forward for kind in LINEAR]:
        return True
    width, outputs = module.weight.shape if isinstance(module, Conv1D) else module.weight.shape[::-1]
    try:
        product = module(module.weight.new_zeros(1, width))
    except Exception:  # a forward pass with other inputs
        return False
    return isinstance(product, torch.Tensor) and product.shape == (1, outputs)


def _names_for_peft(model: PreTrainedModel, layers: list[str]) -> tuple[list[str], list[str]]:
    """Split layers into those that peft adapts as modules and those that it adapts only as parameters.

    Layers that peft refuses are left out: kernels of state-space models read their weights directly. Some layers of
    mixtures it takes for the experts of an older transformers and renames them, unless they are named as parameters.
    This function alone uses private names of peft (checked with peft 0.21.2).
    """
    from peft import LoraConfig
    from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    accepted = []
    for path in layers:
        try:
            _check_lora_target_modules_mamba(LoraConfig(), model, _last_name(path))
        except ValueError:
            continue
        accepted.append(path)
    config = LoraConfig(target_modules=list(accepted))
    convert_peft_config_for_transformers(config, model, None)
    kept = set(config.target_modules or ())
    return [path for path in accepted if path in kept], [path for path in accepted if path not in kept]


def _last_name(path: str) -> str:
    return path.rpartition(".")[2]


def _short_names(paths: list[str]) -> str:
    return ", ".join(sorted({".".join(path.split(".")[-2:]) for path in paths}))
