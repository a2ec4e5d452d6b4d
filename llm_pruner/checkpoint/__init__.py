"""The only part that touches model files."""

from .load import DEFAULT_MODEL, DTYPES, EMBEDDED, load, load_config, locate, meta_model
from .mapped import on_disk
from .save import PLAN_FILE, complete_folder, save, sync_folder, write_checkpoint, write_text

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
    "on_disk",
    "save",
    "sync_folder",
    "write_checkpoint",
    "write_text",
]
