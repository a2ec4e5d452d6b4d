"""Write Llama-like checkpoints in the format of Nemotron-NAS, which other engines read natively.

Its config lists ``block_configs``: key-value groups, MLP width and removed blocks of each layer. All layers have the
same number of query heads. vLLM reads widths as they are; engines that know the format from the first
models alone may round them to multiples of 256.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoint.save import write_checkpoint
from ..errors import PrunerError
from ..files import strict_json, write_text
from ..models.per_layer import REFUSAL_FIELD, SUBMODULES, stack_of
from .gguf_writer import LIKE_LLAMA, head_size, layer_shapes, warn_of_window

WINDOWS = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")  # fields of Qwen2
CONFIG_FILE = "configuration_decilm.py"
# The config class, for engines that ask transformers for it with trust_remote_code.
CONFIG_SOURCE = '''"""Config of a checkpoint with ``block_configs``: Llama's, with sizes by layer."""

from types import SimpleNamespace

from transformers import LlamaConfig


class DeciLMConfig(LlamaConfig):
    model_type = "nemotron-nas"

    def __init__(self, block_configs=None, **kwargs):
        super().__init__(**kwargs)
        self.block_configs = [
            SimpleNamespace(**{name: SimpleNamespace(**part) for name, part in block.items()})
            for block in block_configs or []
        ]

    def to_dict(self):
        out = super().to_dict()
        out["block_configs"] = [
            {name: vars(part) for name, part in vars(block).items()} for block in self.block_configs
        ]
        return out
'''


def check_nemotron_nas(model: PreTrainedModel) -> None:
    """Refuse a model that the format cannot express.

    Raises:
        PrunerError: it is not Llama-like, or its layers have different numbers of query heads.
    """
    config = model.config
    if config.model_type not in LIKE_LLAMA:
        raise PrunerError(f"--format nemotron-nas is for {', '.join(LIKE_LLAMA)}, and this is {config.model_type}")
    heads = {layer.heads for layer in layer_shapes(model)} - {0}
    if len(heads) > 1:
        raise PrunerError(
            f"--format nemotron-nas has one number of query heads for all layers, and these have {sorted(heads)}: "
            "prune heads with --uniform, or export with --format gguf"
        )


def write_nemotron_nas(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    """Write a checkpoint with ``block_configs`` into a folder; norms before removed blocks are left out.

    Raises:
        PrunerError: as :func:`check_nemotron_nas`.
    """
    check_nemotron_nas(model)
    warn_of_window(model.config, "nemotron-nas")
    layers = layer_shapes(model)
    for module, layer in zip(stack_of(model.base_model, len(layers)) or [], layers, strict=True):
        for norm, size in (("input_layernorm", layer.heads), ("post_attention_layernorm", layer.neurons)):
            if not size:  # the format has no norm before a removed block
                module.set_submodule(norm, nn.Identity())
    write_checkpoint(model, tokenizer, folder)
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    for name in (SUBMODULES, REFUSAL_FIELD, "per_layer_config", *WINDOWS):
        config.pop(name, None)
    blocks: list[dict[str, Any]] = []
    for layer in layers:
        group = layer.heads // layer.key_value_heads if layer.heads else None
        attention = {"n_heads_in_group": group, "no_op": not layer.heads, "replace_with_linear": False}
        mlp = {"intermediate_size": layer.neurons or None, "no_op": not layer.neurons, "replace_with_linear": False}
        blocks.append({"attention": attention, "ffn": mlp})
    config |= {
        "architectures": ["DeciLMForCausalLM"],
        "model_type": "nemotron-nas",
        "auto_map": {"AutoConfig": f"{Path(CONFIG_FILE).stem}.DeciLMConfig"},
        "block_configs": blocks,
        "num_attention_heads": max(layer.heads for layer in layers),
        "num_key_value_heads": max(layer.key_value_heads for layer in layers),
        "intermediate_size": max(layer.neurons for layer in layers),
        "head_dim": head_size(model.config),
    }
    if model.config.model_type == "qwen2":
        config["qkv_bias"] = True
    write_text(file, strict_json(config))
    write_text(folder / CONFIG_FILE, CONFIG_SOURCE)
