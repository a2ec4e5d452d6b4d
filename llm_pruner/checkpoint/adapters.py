"""Merge peft adapters into the models that they were trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import PrunerError
from ..files import read_json
from .bounds import bounded_construction
from .locate import ADAPTER, explain
from .shards import tensors_in

MOST_LAYERS = 1_000  # that an adapter makes of a model's layers, by repeating them


def merge_adapter(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str,
    *,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Merge the adapter in ``folder`` into its base model; return the model, and the adapter's tokenizer if any.

    Args:
        trust_remote_code: run the tokenizer's code that comes with the adapter.

    Raises:
        PrunerError: the folder holds no safetensors, or the adapter does not fit the model.
    """
    from peft import PeftModel

    weights = Path(folder) / "adapter_model.safetensors"
    if not weights.is_file():
        raise PrunerError(f"{folder} holds no adapter_model.safetensors; pickles are never read")
    try:
        repeated = read_json(Path(folder) / ADAPTER).get("layer_replication") or ()
        if sum(end - start for start, end in repeated) > MOST_LAYERS:
            raise PrunerError(f"{folder}: its layer_replication makes more than {MOST_LAYERS:,} layers")
        _fit_embeddings(model, weights)
        with bounded_construction(folder, lambda: weights.stat().st_size):
            merged = PeftModel.from_pretrained(model, folder).merge_and_unload(safe_merge=True)
        if any(Path(folder).glob("tokenizer*.json")):
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except PrunerError:
        raise
    except Exception as error:
        raise PrunerError(explain(folder, folder, error)) from error
    return merged.eval(), tokenizer


def _fit_embeddings(model: PreTrainedModel, weights: Path) -> None:
    """Give a model the tokens of an adapter that was trained with more, and so holds embeddings of its own."""
    embeddings: Any = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embeddings)
    stored = (place for key, place in tensors_in(weights).items() if key.endswith(f".{name}.weight"))
    if (place := next(stored, None)) and place.shape[0] != embeddings.weight.shape[0]:
        model.resize_token_embeddings(place.shape[0], mean_resizing=False)
