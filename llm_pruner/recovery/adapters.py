"""What is trained of a pruned model: adapters of its linear layers and stacked experts, by peft, or all weights."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

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
    layers, weights = _for_peft(model, linear)
    parameters = weights + stacked
    if not layers and (not parameters or args.method == "dora"):
        raise PrunerError("the model has no linear layer that an adapter can be added to: give --method full")
    dropout = args.lora_dropout
    if parameters and args.method == "dora":
        log.info("dora does not reach %s", _told(parameters))
        parameters = []
    if parameters and dropout:
        log.info("no dropout, which adapters of %s cannot have", _told(parameters))
        dropout = 0.0
    config = LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=dropout,
        target_modules=layers,
        target_parameters=parameters or None,
        use_dora=args.method == "dora",
        bias="none",
        task_type=TaskType.SEQ_2_SEQ_LM if model.config.is_encoder_decoder else TaskType.CAUSAL_LM,
    )
    if args.gradient_checkpointing:
        model.enable_input_require_grads()
    found = get_peft_model(model, config)
    if Path(args.model).is_dir():  # so that the adapter finds it from anywhere; a hub id is its own name
        found.peft_config["default"].base_model_name_or_path = str(Path(args.model).resolve())
    return found


def _chosen(args: RecoverArguments, model: PreTrainedModel) -> tuple[list[str], list[str]]:
    """The linear layers that get an adapter, and the parameters that hold a matrix of every expert."""
    head = model.get_output_embeddings()
    asked = args.lora_target_modules
    shapes: dict[str, tuple[int, ...]] = {}
    stacked: set[str] = set()
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for path, module in model.named_modules():
        if isinstance(module, LINEAR):
            # The head only by name; of a weight with several uses peft would adapt one, and merging changes all.
            wanted = bool(asked) if module is head else uses[id(module.weight)] == 1
            if wanted and _multiplies(module) and not _refused(model, path):
                shapes[path] = tuple(cast(torch.Tensor, module.weight).shape)
        elif "expert" in f"{path} {type(module).__name__}".lower():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.ndim == 3 and uses[id(parameter)] == 1:
                    stacked.add(f"{path}.{name}")
                    shapes[f"{path}.{name}"] = tuple(parameter.shape[1:])
    known = sorted({_last(name) for name in shapes})
    for name in asked:
        if name not in known:
            raise PrunerError(f"--lora_target_modules: the model has no linear layer {name}; it has {', '.join(known)}")
    chosen = [name for name in shapes if not asked or _last(name) in asked]
    for name in chosen:
        if args.lora_r > min(shapes[name]):
            raise PrunerError(f"--lora_r {args.lora_r} is more than {name} {list(shapes[name])} is wide: lower it")
    return [name for name in chosen if name not in stacked], [name for name in chosen if name in stacked]


@torch.no_grad()
def _multiplies(module: Any) -> bool:
    """Whether a layer gives its product, which an adapter's can be added to; some routers are layers and do not."""
    if type(module).forward in [kind.forward for kind in LINEAR]:
        return True
    width, out = module.weight.shape if isinstance(module, Conv1D) else module.weight.shape[::-1]
    try:
        found = module(module.weight.new_zeros(1, width))
    except Exception:  # it wants something else
        return False
    return isinstance(found, torch.Tensor) and found.shape == (1, out)


def _refused(model: PreTrainedModel, name: str) -> bool:
    """Whether peft refuses a layer: kernels of state-space models read the weights of some themselves."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import _check_lora_target_modules_mamba

    try:
        _check_lora_target_modules_mamba(LoraConfig(), model, _last(name))
    except ValueError:
        return True
    return False


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _told(names: list[str]) -> str:
    return ", ".join(sorted({".".join(name.split(".")[-2:]) for name in names}))


def _for_peft(model: PreTrainedModel, layers: list[str]) -> tuple[list[str], list[str]]:
    """The layers by name, and those by weight whose names peft takes for the experts' of an older transformers."""
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    taken = LoraConfig(target_modules=list(layers))
    convert_peft_config_for_transformers(taken, model, None)
    left = set(taken.target_modules or ())
    return [name for name in layers if name in left], [f"{name}.weight" for name in layers if name not in left]
