"""Say which engines besides transformers run a checkpoint."""

from __future__ import annotations

from transformers import PreTrainedConfig

from ..models.per_layer import CONSTANTS, has_per_layer_widths, overrides_of

BESIDE_VLLM = "llm_pruner installed beside vLLM"


def why_not_vllm(config: PreTrainedConfig) -> str:
    """Return why vLLM's transformers backend would run a model with layers that differ wrongly, "" if it would not.

    Args:
        config: text config of a checkpoint.
    """
    if getattr(config, CONSTANTS, None):
        return "its layers have constants of their own"
    for path, recipe in overrides_of(config).items():
        if any("head" in name for name in recipe.get("values", {})):
            return f"the heads of {path} have no field in its config; llm-pruner to-uniform makes a plain checkpoint"
    return ""


def serving_lines(config: PreTrainedConfig, name: str) -> list[str]:
    """Return Markdown lines of a model card that say how to run a language model's folder in each engine.

    Args:
        name: of the folder.
    """
    text = config.get_text_config()
    lines = []
    if not has_per_layer_widths(config):
        lines.append(f"* vLLM: `vllm serve {name}`, as any {type(config).__name__.removesuffix('Config')} checkpoint")
        lines.append("* llama.cpp: its own converter reads the folder; so does `llm-pruner export --format gguf`")
    elif reason := why_not_vllm(text):
        lines.append(f"* vLLM: not as it is, since {reason}")
    else:
        lines.append(f"* vLLM: `vllm serve {name}` with {BESIDE_VLLM}, through vLLM's transformers backend")
        lines.append(f"* llama.cpp: `llm-pruner export {name} {name}.gguf --format gguf`, for Llama-like models")
    return lines
