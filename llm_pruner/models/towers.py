"""Find the towers of a model that reads images or sounds beside text: the encoders of each."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedModel

from .layers import is_below
from .tasks import predicts_tokens

MODALITIES = {"vision": "image", "audio": "audio"}  # of transformers' ``get_encoder``


def tower_paths(model: PreTrainedModel) -> dict[str, str]:
    """Return the path of each tower, ``vision`` or ``audio``, beside the language of a model that writes text."""
    if not predicts_tokens(model):
        return {}
    names = {id(module): name for name, module in model.named_modules()}
    paths = {tower: names.get(id(model.get_encoder(modality)), "") for tower, modality in MODALITIES.items()}
    language = {"", names.get(id(model.base_model), ""), names.get(id(model.get_decoder()), "")}
    return {tower: path for tower, path in paths.items() if path not in language}


def reach_towers(model: PreTrainedModel, names: Iterable[str]) -> bool:
    """Return True if any of the names, of units or parameters, lies in a tower beside the language."""
    paths = tower_paths(model).values()
    return any(is_below(path, name) for name in names for path in paths)
