"""Merge peft adapters into the models that they were trained on."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import PrunerError
from .locate import explain


def merge_adapter(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Merge the adapter in ``folder`` into its base model; return the model, and the adapter's tokenizer if any.

    Raises:
        PrunerError: the folder holds no safetensors, or the adapter does not fit the model.
    """
    from peft import PeftModel

    if not (Path(folder) / "adapter_model.safetensors").is_file():
        raise PrunerError(f"{folder} holds no adapter_model.safetensors; pickles are never read")
    try:
        merged = PeftModel.from_pretrained(model, folder).merge_and_unload(safe_merge=True)
        if any(Path(folder).glob("tokenizer*.json")):
            tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        raise PrunerError(explain(folder, folder, error)) from error
    return merged.eval(), tokenizer
