"""Load models and tokenizers: by alias or hub id, from a folder, an adapter or a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..errors import PrunerError, Unavailable, is_panic
from ..logs import log
from ..models.dispatch import check_device, spread
from ..models.tasks import ask_for, auto_model_class
from ..progress import Step, without_bars
from ..surgery.apply import Place, in_memory
from .adapters import merge_adapter
from .bounds import bounded_construction, weight_file_bytes
from .config import checked_config, untie
from .gguf_reader import parsed_once
from .integrity import check
from .locate import PLAN_FILE, base_of, explain, fetch_quantized, is_adapter, locate
from .on_disk import on_disk
from .quantized.registry import QuantizedShards, open_shards
from .read_assembled import is_in_parts, read_assembled
from .shards import INDEX, Shards, shard_files
from .unread import note_unread

# Files that a tokenizer is read from, one at least.
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "vocab.*", "*.model", "*.tiktoken", "*.spm", "tekken.json")
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
    *,
    revision: str | None = None,
    token: str | None = None,
    device_map: str | None = None,
    verify: bool = False,
    task: str | None = None,
    offload_folder: str | Path | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load a model, in eval mode, and its tokenizer. Quantized weights are dequantized.

    Args:
        name: ``smollm2-135m`` (the embedded model), a hub id, a folder, or a ``.gguf`` file, which is dequantized. The
            folder of a peft adapter gives the model that it was trained on with the adapter merged into it.
        dtype: dtype of the weights; ``auto`` keeps the checkpoint's (float32 for GGUF).
        device: device of the weights.
        trust_remote_code: run modelling code that comes with the checkpoint.
        revision: branch, tag or commit of a hub repository.
        token: access token for the hub.
        device_map: ``auto`` fills the GPUs with layers, one after the other, and leaves on the CPU what does not fit,
            to be brought in one layer at a time; ``device`` is then ignored.
        verify: first check the folder of a pruned model against the hashes in its plan; others have none.
        task: load the class of this task, such as ``text-generation``, instead of the class that the checkpoint
            declares; tensors that this class does not read are named in the log.
        offload_folder: folder on whose disk weights are put, memory-mapped, instead of in memory, that are stored in
            another form: quantized, or every expert by itself. Other weights stay in their files anyway.

    Returns:
        Model and tokenizer; the tokenizer is None for a folder without one.

    Raises:
        PrunerError: the model or device does not exist, the checkpoint is incomplete, pickled or quantized in a format
            that is not read, or its architecture has no class for the task.

    Example:
        >>> import llm_pruner as lp
        >>> model, tokenizer = lp.load("smollm2-135m")
        >>> model.config.num_hidden_layers, len(tokenizer)
        (30, 49152)
    """
    path, _ = locate(name)
    options: dict[str, Any] = {"revision": revision, "token": token}
    of_weights: dict[str, Any] = {"device_map": device_map, "verify": verify, "task": task}
    of_weights["offload_folder"] = offload_folder
    if is_adapter(path):
        base = load(base_of(path), dtype, device, trust_remote_code, **options, **of_weights)
        return merge_adapter(*base, path, trust_remote_code=trust_remote_code)
    with parsed_once():
        model = load_model(name, dtype, device, trust_remote_code, **options, **of_weights)
        return model, load_tokenizer(name, trust_remote_code, **options, config=model.config)


def load_with_tokenizer(name: str, *arguments: Any, **options: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load as :func:`load` does; refuse a model without a tokenizer.

    Raises:
        PrunerError: as :func:`load`, and for a folder without a tokenizer.
    """
    model, tokenizer = load(name, *arguments, **options)
    if tokenizer is None:
        raise no_tokenizer(name)
    return model, tokenizer


def no_tokenizer(name: str) -> Unavailable:
    """Return the error for a folder without the tokenizer that its model, or a command, cannot do without."""
    return Unavailable(f"{name} has no tokenizer: put the original's files there ({TOKENIZERS[0]} and others)")


def load_tokenizer(
    name: str,
    trust_remote_code: bool = False,
    *,
    revision: str | None = None,
    token: str | None = None,
    config: PreTrainedConfig | None = None,
) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer alone; None for a folder without one.

    Raises:
        PrunerError: the tokenizer's files cannot be read.
    """
    path, gguf = locate(name, revision)
    extra = {"gguf_file": gguf} if gguf else {}
    if Path(path).is_dir() and not any(any(Path(path).glob(p)) for p in TOKENIZERS) and not gguf:
        return None
    try:
        with parsed_once():
            return AutoTokenizer.from_pretrained(
                path,
                config=config,
                trust_remote_code=trust_remote_code,
                revision=revision or "main",
                token=token,
                **extra,
            )
    except BaseException as error:  # transformers raises whatever its loaders raise; the user needs one line
        if not (isinstance(error, Exception) or is_panic(error)):
            raise
        raise PrunerError(explain(name, path, error)) from error


def load_model(
    name: str,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
    *,
    revision: str | None = None,
    token: str | None = None,
    device_map: str | None = None,
    verify: bool = False,
    task: str | None = None,
    offload_folder: str | Path | None = None,
) -> PreTrainedModel:
    """Load the model alone, as :func:`load` does; no adapters.

    Raises:
        PrunerError: as :func:`load`.
    """
    dtype = torch_dtype(dtype)
    check_device(device, "device")
    if device_map not in (None, "auto"):
        raise PrunerError(f"device_map {device_map!r} is not valid: give auto, or leave it out")
    path, gguf = locate(name, revision)
    if (Path(path) / INDEX).is_file():
        shard_files(Path(path))
    if verify and Path(path).is_dir() and gguf is None:  # unpruned models have no plan, and so no hashes
        if (Path(path) / PLAN_FILE).is_file():
            check(path, trust_remote_code)
        else:
            log.info("%s has no %s: there is nothing to verify it by", path, PLAN_FILE)
    common: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision or "main", "token": token}
    if gguf is not None:
        common["gguf_file"] = gguf
    bound = bounded_construction(name, lambda: weight_file_bytes(path, gguf, common["revision"]))
    with parsed_once(), without_bars(), Step(f"loading {name}"), bound:
        place = in_memory if offload_folder is None else on_disk(offload_folder)
        model, report, shards = _read_model(name, dtype, common, task=task, place=place)
    if report["missing_keys"] and task is not None:
        raise PrunerError(
            f"{name} cannot be loaded for the task {task}: it holds no {min(report['missing_keys'])} of "
            f"{type(model).__name__}"
        )
    if report["missing_keys"]:
        raise PrunerError(
            f"{name} lacks {len(report['missing_keys'])} tensors of its architecture, such as "
            f"{min(report['missing_keys'])}: the checkpoint is incomplete"
        )
    _note_untied(model, name)
    if gguf is None:
        note_unread(model, name, shards.shapes() if shards else (), report["unexpected_keys"])
    else:
        _forget_quantization(model)
    return (spread(model) if device_map else model.to(device)).eval()  # type: ignore[arg-type]


def _read_model(
    name: str, dtype: str | torch.dtype, common: dict[str, Any], *, task: str | None, place: Place
) -> tuple[PreTrainedModel, Any, Shards | None]:
    """Read a model with transformers; return it, the loader's report, and its shards if it has any here.

    Args:
        place: function that moves weights that are stored in another form to their final memory.
    """
    path, gguf = locate(name, common["revision"])
    shards = None
    kwargs: dict[str, Any] = {"dtype": torch.float32 if gguf and dtype == "auto" else dtype}
    try:
        config = AutoConfig.from_pretrained(path, **common) if gguf else checked_config(name, path, **common)
        ask_for(task, config)
        named_index = str(getattr(config, "transformers_weights", ""))
        if (Path(path) / named_index).is_file() and named_index.endswith(".json"):
            shard_files(Path(path), named_index)
        if gguf is None:
            shards = open_shards(name, Path(path))
            trust = common["trust_remote_code"]
            quantized, offloads = isinstance(shards, QuantizedShards), place is not in_memory
            if shards is not None and (quantized or (offloads and is_in_parts(name, config, shards, trust))):
                model, report = read_assembled(name, config, shards, dtype=dtype, place=place, trust_remote_code=trust)
                return model, report, shards
            if getattr(config, "quantization_config", None) and not Path(path).is_dir():
                if not fetch_quantized(name, common["revision"], common["token"]):
                    raise PrunerError(f"{name} is quantized: give its folder (hf download {name})")
                return _read_model(name, dtype, common, task=task, place=place)
            kwargs["use_safetensors"] = True
        else:
            kwargs["quantization_config"] = GgufConfig(dequantize=True)
        model, report = auto_model_class(config).from_pretrained(
            path, config=config, output_loading_info=True, **common, **kwargs
        )
        return model, report, shards
    except PrunerError:
        raise
    except Exception as error:
        raise PrunerError(explain(name, path, error)) from error


def _note_untied(model: PreTrainedModel, name: str) -> None:
    """Let the config of a model say so if its files hold a head of its own, although they call it tied.

    transformers reads such a head as it stands; a config that still said "tied" would lose it when the model is saved.
    """
    head = model.get_output_embeddings()
    configs = (model.config, model.config.get_text_config())
    if head is None or not any(getattr(config, "tie_word_embeddings", False) for config in configs):
        return
    own, tied = (getattr(module, "weight", None) for module in (head, model.get_input_embeddings()))
    if own is None or tied is None or own is tied or own.shape != tied.shape or torch.equal(own, tied):
        return
    untie(model.config, name)


def torch_dtype(value: str | torch.dtype) -> str | torch.dtype:
    """Return the torch dtype of a name; ``auto`` stays.

    Raises:
        PrunerError: the name is not one of :data:`DTYPES`.
    """
    if isinstance(value, torch.dtype):
        return value
    if value not in DTYPES:
        raise PrunerError(f"dtype {value!r} is not valid: choose from {', '.join(DTYPES)}")
    return DTYPES[value]


def _forget_quantization(model: PreTrainedModel) -> None:
    """Forget that a dequantized model was quantized: it would refuse to be saved."""
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        if name in model.__dict__:
            delattr(model, name)
    model.config.__dict__.pop("quantization_config", None)
