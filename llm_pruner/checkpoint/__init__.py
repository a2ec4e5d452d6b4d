"""The only part that touches model files."""

from .card import upload, write_card
from .integrity import check
from .load import (
    DEFAULT_MODEL,
    DTYPES,
    EMBEDDED,
    base_of,
    identity,
    is_adapter,
    load,
    load_config,
    load_tokenizer,
    locate,
    meta_model,
    usable,
)
from .mapped import on_disk
from .save import PLAN_FILE, save, write_checkpoint
from .shards import Shards
from .standalone import write_modelling
from .stream import apply_to_files, cut_files, weights_in

__all__ = [
    "DEFAULT_MODEL",
    "DTYPES",
    "EMBEDDED",
    "PLAN_FILE",
    "Shards",
    "apply_to_files",
    "base_of",
    "check",
    "cut_files",
    "identity",
    "is_adapter",
    "load",
    "load_config",
    "load_tokenizer",
    "locate",
    "meta_model",
    "on_disk",
    "save",
    "upload",
    "usable",
    "weights_in",
    "write_card",
    "write_checkpoint",
    "write_modelling",
]
