"""Copy what a checkpoint holds beside weights and config: tokenizer, processor, licence, code of its own."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers.dynamic_module_utils import get_relative_imports

from ..files import read_json
from ..logs import log

TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "*.jinja"),
    *("*.tiktoken", "*.spm", "tekken.json", "chat_template.json"),
    # Further files that classes of transformers name in ``vocab_files_names``.
    *("*_vocab.json", "bpe.codes", "byte_maps.json", "dict.txt", "emoji.json", "normalizer.json", "*.tokenizer"),
    *("word_pronunciation.json", "word_shape.json"),
)
CHAT_TEMPLATES = "additional_chat_templates"  # folder of a tokenizer with several
SENTENCE_MODULES = "modules.json"  # of sentence-transformers: the parts of a model of embeddings, and their folders
PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
OTHER_FILES = (
    *(*PROCESSORS, "chat_template.*"),
    *(SENTENCE_MODULES, "sentence_*_config.json", "config_sentence_transformers.json", "LICENSE*", "NOTICE*"),
)
MAPPING = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")


def copy_companions(source: Path, folder: Path, *, tokenizer: bool = True) -> None:
    """Copy the companion files of a checkpoint that ``folder`` lacks, and the code that its configs name.

    Args:
        tokenizer: copy the tokenizer's files as well.
    """
    for pattern in (*TOKENIZER_FILES, *OTHER_FILES) if tokenizer else OTHER_FILES:
        for file in source.glob(pattern):
            if file.is_file() and not file.name.startswith("model.") and _is_inside(file, source):
                _copy_missing(file, folder)
    for name in (*_module_folders(source / SENTENCE_MODULES), CHAT_TEMPLATES):
        if (source / name).is_dir() and not (folder / name).exists() and _is_inside(source / name, source):
            shutil.copytree(
                source / name,
                folder / name,
                ignore=lambda place, names: [one for one in names if not _is_inside(Path(place) / one, source)],
            )
    copy_code(source, folder)


def companions_of(name: str | None, revision: str | None = None) -> Path | None:
    """Return a folder with the companion files of a checkpoint, without those of its tokenizer.

    Args:
        name: folder or hub id.
        revision: commit that the model was loaded from, None if it does not come from the hub.

    Returns:
        None for a model that comes from nowhere, and for a hub that cannot be reached any more.
    """
    if name and Path(name).is_dir():
        return Path(name)
    if not name or revision is None:
        return None
    try:
        patterns = [*OTHER_FILES, "*_*/config.json", "*_*/model.safetensors"]
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception:  # whatever the network does
        log.warning("%s: the files of its processor could not be fetched: copy them beside the pruned model", name)
        return None


def _module_folders(file: Path) -> Iterator[str]:
    """Yield the folders that a ``modules.json`` names; the model itself lies in the folder of that file."""
    modules: Any = read_json(file) if file.is_file() else []
    for module in modules if isinstance(modules, list) else []:
        name = module.get("path") if isinstance(module, dict) else None
        if isinstance(name, str) and name and Path(name).name == name:
            yield name


def copy_code(source: Path, folder: Path) -> None:
    """Copy the modules that the configs in ``folder`` name in ``auto_map``, and their relative imports."""
    modules = [name for config in MAPPING for name in _mapped_modules(folder / config)]
    copied: set[str] = set()
    while modules:
        name = modules.pop()
        file = source / f"{name}.py"
        # As transformers has it, all modules lie in the folder itself; others, of hub repositories, come from there.
        if name in copied or Path(name).name != name or not file.is_file() or not _is_inside(file, source):
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


def _is_inside(file: Path, source: Path) -> bool:
    """Return True if a file lies in a checkpoint's folder, as no link to a user's own files does; log such links.

    In the hub's cache, files are links to others of the same repository.
    """
    home = source.resolve()
    repository = home.parents[1] if home.parent.name == "snapshots" else home
    home = repository if repository.name.startswith("models--") else home
    if file.resolve().is_relative_to(home):
        return True
    log.warning("%s is a link to a file outside of the checkpoint: it is not copied", file)
    return False


def _copy_missing(file: Path, folder: Path) -> None:
    if not (folder / file.name).exists():
        shutil.copyfile(file, folder / file.name)
