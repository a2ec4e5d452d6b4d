"""Let vLLM serve checkpoints whose layers differ: a plugin of its group ``vllm.general_plugins``.

vLLM loads it by itself wherever both packages are installed. Its own models read one width for all layers; its
transformers backend builds the model from the config, layer by layer, which :mod:`llm_pruner.models.per_layer` makes
right. For checkpoints with per-layer widths, and for no other, the plugin

* chooses the transformers backend,
* refuses what this backend would get wrong: tensor parallelism that does not divide the widths of every layer, heads
  that the config has no field for, constants such as ALiBi's slopes that differ by layer,
* creates no key-value cache for removed attention blocks, and as many experts as each layer has.

Private names of vLLM that it wraps, checked on 0.32, are all in :func:`register`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

from ..checkpoint.engines import why_not_vllm
from ..models.per_layer import Absent, has_per_layer_widths, overrides_of

# Fields of a layer's config that tensor parallelism divides among devices.
SHARED_WIDTHS = (
    *("num_attention_heads", "num_key_value_heads"),
    *("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"),
)
_MARK = "_llm_pruner"


def register() -> None:
    """Teach vLLM to serve checkpoints whose layers differ; do nothing the second time."""
    from vllm.config import ModelConfig
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.model_executor.models.transformers import moe
    from vllm.model_executor.models.transformers.base import Base

    registry = type(ModelRegistry)
    _wrap(registry, "inspect_model_cls", _with_backend)
    _wrap(registry, "resolve_model_cls", _with_backend)
    _wrap(ModelConfig, "verify_with_parallel_config", _with_checked_parts)
    _wrap(Base, "_create_attention_instances", _without_absent_attention)
    _wrap(moe, "FusedMoEFactory", _with_layer_experts)


def _wrap(owner: Any, name: str, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    original = getattr(owner, name)
    if not hasattr(original, _MARK):
        wrapped = functools.wraps(original)(wrapper(original))
        setattr(wrapped, _MARK, True)
        setattr(owner, name, wrapped)


def _with_backend(original: Callable[..., Any]) -> Callable[..., Any]:
    """Choose the transformers backend for a checkpoint whose layers differ, before its class is looked up."""

    def find_class(self: Any, architectures: Any, model_config: Any) -> Any:
        config = model_config.hf_config.get_text_config()
        if has_per_layer_widths(config):
            if model_config.model_impl not in ("auto", "transformers"):
                raise ValueError(
                    f"--model-impl {model_config.model_impl}: the layers of {model_config.model} have different "
                    "widths, which only --model-impl transformers serves"
                )
            if reason := why_not_vllm(config):
                raise ValueError(f"{model_config.model} cannot be served: {reason}")
            model_config.model_impl = "transformers"
        return original(self, architectures, model_config)

    return find_class


def _with_checked_parts(original: Callable[..., Any]) -> Callable[..., Any]:
    def verify(self: Any, parallel_config: Any) -> None:
        config = self.hf_config.get_text_config()
        if has_per_layer_widths(config) and (reason := indivisible(config, parallel_config.tensor_parallel_size)):
            raise ValueError(reason)
        original(self, parallel_config)

    return verify


def indivisible(config: Any, parts: int) -> str:
    """Return which width of which layer as many devices cannot share equally, "" if they can.

    >>> from transformers import LlamaConfig
    >>> per_layer = {1: {"intermediate_size": 33}}
    >>> config = LlamaConfig(num_hidden_layers=2, intermediate_size=64, per_layer_config=per_layer)
    >>> indivisible(config, 2)
    '--tensor-parallel-size 2: layer 1 has intermediate_size 33; prune with --tensor_parallel 2'
    """
    if parts == 1:
        return ""
    layers = config.per_layer_config if getattr(config, "is_heterogeneous", False) else [config]
    for i in range(len(layers)):
        for name in SHARED_WIDTHS:
            value = getattr(layers[i], name, None)
            if isinstance(value, int) and value % parts:
                fix = f"prune with --tensor_parallel {parts}"
                return f"--tensor-parallel-size {parts}: layer {i} has {name} {value}; {fix}"
    return "" if not overrides_of(config) else _indivisible_block(config, parts)


def _indivisible_block(config: Any, parts: int) -> str:
    """Return, in words, a block with values of its own that the devices cannot share; "" if all are removed blocks."""
    path = next((path for path, recipe in overrides_of(config).items() if "absent" not in recipe), None)
    return f"--tensor-parallel-size {parts}: the widths of {path} have no field in the config" if path else ""


def _without_absent_attention(original: Callable[..., Any]) -> Callable[..., Any]:
    """Skip layers whose attention block is removed: they need no key-value cache."""

    def create(self: Any, prefix: str = "") -> None:
        absent: dict[int, str] = {}
        for name, module in self.model.named_modules():
            number = re.search(r"\.(\d+)\.", f".{name}")
            if isinstance(module, Absent) and number and int(number[1]) not in self.attention_fusers:
                absent.setdefault(int(number[1]), f"model.{name}")
        self.attention_fusers |= {i: (name, _NoAttention()) for i, name in absent.items()}
        original(self, prefix)
        for name in absent.values():
            module = self.get_submodule(name)
            context = self.compilation_config.static_forward_context
            for key in [key for key, layer in context.items() if layer is getattr(module, "attn", None)]:
                del context[key]
            del module.attn

    return create


class _NoAttention:
    """Stand-in for the record of a removed attention block."""

    def scale(self, _: Any) -> None:
        return None

    def sinks(self, _: Any) -> None:
        return None


def _with_layer_experts(original: Callable[..., Any]) -> Callable[..., Any]:
    """Give each layer's experts their own number and width."""
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.models.utils import extract_layer_index

    def make(**kwargs: Any) -> Any:
        model_config = get_current_vllm_config().model_config
        config = model_config.hf_config.get_text_config()
        if getattr(config, "is_heterogeneous", False):
            index = extract_layer_index(kwargs["prefix"])
            layer = config.per_layer_config[index]
            kwargs["num_experts"] = model_config.model_arch_config[index].num_experts
            widths = (getattr(layer, name, None) for name in ("moe_intermediate_size", "intermediate_size"))
            kwargs["intermediate_size"] = next(width for width in widths if width is not None)
        return original(**kwargs)

    return make
