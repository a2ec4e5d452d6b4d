"""Write the checkpoint of a pruned model in the form of the original's files: quantized ones are sliced."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..selection.plan import PruningPlan
from .apply_files import cut_files
from .blocks import is_quantized
from .config import load_config
from .save import write_checkpoint
from .standalone import write_modelling
from .stored import dtype_of


def write_pruned(
    pruned: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    plan: PruningPlan,
    *,
    source: str,
    dequantize: bool = False,
    standalone: bool = False,
    trust_remote_code: bool = False,
    task: str | None = None,
) -> None:
    """Write the files of a checkpoint into a folder that the caller completes.

    Args:
        pruned: model that the plan leaves of ``source``; where quantized files are sliced, its weights are not read.
        source: model that was pruned.
        dequantize: write a quantized model in 16 bits, with the weights of ``pruned``.

    Raises:
        PrunerError: the plan cuts quantized weights inside the blocks of their scales.
    """
    if is_quantized(source) and not dequantize:
        cut_files(plan, source, folder, trust_remote_code, task=task, pruned=pruned)
        if standalone:
            write_modelling(pruned, folder)
        return
    if dequantize:
        _round_weights(pruned, dtype_of(load_config(source, trust_remote_code)))
    write_checkpoint(pruned, tokenizer, folder, plan, standalone=standalone)


def _round_weights(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Convert the weights of a model to a dtype; its buffers stay, since tables of sines lose by rounding."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
