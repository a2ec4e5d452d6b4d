"""Copy what a checkpoint holds beside weights and config: tokenizer files, licence, code of its own."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_imports

from ..files import read_json

TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "*.jinja"),
    *("*.tiktoken", "*.spm", "tekken.json", "chat_template.json"),
)
COMPANIONS = (*TOKENIZER_FILES, "preprocessor_config.json", "processor_config.json", "LICENSE*", "NOTICE*")
MAPPING = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")


def copy_companions(source: Path, folder: Path) -> None:
    """Copy the companion files of a checkpoint that ``folder`` lacks, and the code that its configs name."""
    for pattern in COMPANIONS:
        for file in source.glob(pattern):
            if file.is_file() and not file.name.startswith("model"):
                _copy_missing(file, folder)
    copy_code(source, folder)


def copy_code(source: Path, folder: Path) -> None:
    """Copy the modules that the configs in ``folder`` name in ``auto_map``, and their relative imports."""
    modules = [name for config in MAPPING for name in _mapped_modules(folder / config)]
    copied: set[str] = set()
    while modules:
        name = modules.pop()
        file = source / f"{name}.py"
        # As transformers has it, all modules lie in the folder itself; others, of hub repositories, come from there.
        if name in copied or Path(name).name != name or not file.is_file():
            continue
        copied.add(name)
        _copy_missing(file, folder)
        modules += get_relative_imports(file)


def _mapped_modules(file: Path) -> Iterator[str]:
    """Yield the modules of ``auto_map``, whose values are ``module.Class`` or lists of these."""
    config: Any = read_json(file) if file.is_file() else {}
    mapping = config.get("auto_map") if isinstance(config, dict) else None
    for value in mapping.values() if isinstance(mapping, dict) else ():
        for reference in value if isinstance(value, list) else [value]:
            if isinstance(reference, str):
                yield reference.rpartition(".")[0]


def _copy_missing(file: Path, folder: Path) -> None:
    if not (folder / file.name).exists():
        shutil.copyfile(file, folder / file.name)
