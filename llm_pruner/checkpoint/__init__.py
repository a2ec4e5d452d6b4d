"""The only part that touches model files."""

from .load import DEFAULT_MODEL, DTYPES, EMBEDDED, load, load_config, locate, meta_model
from .save import PLAN_FILE, complete_folder, save, write_checkpoint

__all__ = [
    "DEFAULT_MODEL",
    "DTYPES",
    "EMBEDDED",
    "PLAN_FILE",
    "complete_folder",
    "load",
    "load_config",
    "locate",
    "meta_model",
    "save",
    "write_checkpoint",
]
