"""Inputs of a model: token ids, or tensors by the names of the arguments of its ``forward``."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ..errors import PrunerError
from .image_inputs import draw_image_in_text
from .input_sizes import input_shape
from .tasks import OF_WHOLE_TEXTS, predicts_tokens, task_name

IDS = {"input_ids", "decoder_input_ids"}
TOKENS_OF_OTHERS = 512  # about what an image or a few seconds of sound are in a model


class ModelInputs:
    """Inputs by the names of the arguments of a model's ``forward``, in samples.

    It is sliced, split, moved and counted as a LongTensor ``[samples, tokens]`` is.

    Args:
        parts: what a processor returns. A mapping whose tensors have as many rows as each other holds a sample a row;
            another, such as that of images cut into patches of varying number, is one sample.

    >>> pair = ModelInputs({"pixel_values": torch.zeros(4, 3, 8, 8), "input_ids": torch.zeros(4, 5, dtype=torch.long)})
    >>> len(pair), [len(part) for part in pair.split(3)], list(pair[:2].tensors()["input_ids"].shape)
    (4, [3, 1], [2, 5])
    """

    def __init__(self, *parts: Mapping[str, Any]):
        self.parts = [{name: value for name, value in part.items() if torch.is_tensor(value)} for part in parts]
        if not all(self.parts):
            raise PrunerError("the inputs of a model must be tensors by name, as a processor returns them")

    def __len__(self) -> int:
        return sum(_rows(part) for part in self.parts)

    def __getitem__(self, rows: slice) -> ModelInputs:
        if len(self.parts) == 1 and _rows(self.parts[0]) > 1:
            return ModelInputs({name: value[rows] for name, value in self.parts[0].items()})
        return ModelInputs(*[part.parts[0] for part in self.split(1)][rows])

    def split(self, rows: int) -> list[ModelInputs]:
        """Cut into batches of at most so many samples; samples of varying size are batches of their own."""
        batches = []
        for part in self.parts:
            if _rows(part) == 1:
                batches.append(ModelInputs(part))
                continue
            cut = {name: value.split(rows) for name, value in part.items()}
            batches += [ModelInputs(dict(zip(cut, values, strict=True))) for values in zip(*cut.values(), strict=True)]
        return batches

    def to(self, device: torch.device | str) -> ModelInputs:
        """Return the same inputs on a device."""
        return ModelInputs(*({name: value.to(device) for name, value in part.items()} for part in self.parts))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors of one batch by name.

        Raises:
            PrunerError: there are several batches.
        """
        if len(self.parts) != 1:
            raise PrunerError(f"a model runs one batch at a time, and these inputs are {len(self.parts)}")
        return self.parts[0]


Inputs = torch.Tensor | ModelInputs


def as_inputs(value: Any) -> Any:
    """Return mappings, or a list of them, as :class:`ModelInputs`; anything else as it is."""
    if isinstance(value, Mapping):
        return ModelInputs(value)
    if isinstance(value, Sequence) and value and all(isinstance(part, Mapping) for part in value):
        return ModelInputs(*value)
    return value


def tokens_per_sample(inputs: Inputs) -> int:
    """Return the number of tokens of a sample, or an estimate for images and audio."""
    return inputs.shape[1] if isinstance(inputs, torch.Tensor) else TOKENS_OF_OTHERS


_remembered: WeakKeyDictionary[nn.Module, ModelInputs] = WeakKeyDictionary()


@contextmanager
def remembering(model: nn.Module, inputs: ModelInputs) -> Iterator[None]:
    """Let :func:`example_inputs` return these inputs for a model as long as it lives, unless the block fails."""
    before = _remembered.get(model)
    _remembered[model] = inputs
    try:
        yield
    except BaseException:
        del _remembered[model]
        if before is not None:
            _remembered[model] = before
        raise


def share_inputs(model: nn.Module, like: nn.Module) -> None:
    """Let a model have the example inputs that were given for another; its class must be the same."""
    if like in _remembered:
        _remembered[model] = _remembered[like]


def has_remembered_inputs(model: nn.Module) -> bool:
    """Return True if example inputs were given for a model."""
    return model in _remembered


def hash_of(inputs: Inputs) -> str:
    """Return the SHA-256 of the values of inputs."""
    total = hashlib.sha256()
    for part in [{"": inputs}] if isinstance(inputs, torch.Tensor) else inputs.parts:
        for name, value in sorted(part.items()):
            values = value.cpu().contiguous().flatten().view(torch.uint8)  # numpy has no bfloat16
            total.update(name.encode() + values.numpy().tobytes())
    return total.hexdigest()


def _rows(part: Mapping[str, torch.Tensor]) -> int:
    rows = {len(value) if value.ndim else 0 for value in part.values()}
    return rows.pop() if len(rows) == 1 else 1


def check_inputs(model: nn.Module, inputs: Any) -> ModelInputs:
    """Return inputs by name as :class:`ModelInputs`, after checking that they are those of a model.

    Raises:
        PrunerError: they are no tensors by name, the model does not know a name, or one is missing.
    """
    inputs = as_inputs(inputs)
    if not isinstance(inputs, ModelInputs):
        raise PrunerError(f"inputs must be tensors by name, as a processor returns them, not {type(inputs).__name__}")
    parameters = inspect.signature(model.forward).parameters
    passes_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for part in inputs.parts:
        unknown = [name for name in part if name not in parameters] if not passes_on else []
        missing = [name for name in needed_inputs(model) if name not in part]
        if unknown or missing:
            raise PrunerError(
                f"{type(model).__name__} needs {', '.join(needed_inputs(model))}, and the inputs given are "
                f"{', '.join(part)}"
            )
    return inputs


def input_embedding(model: nn.Module) -> nn.Embedding | None:
    """Return the table that a model looks token ids up in, None for a model that reads none."""
    try:
        embedding = getattr(model, "get_input_embeddings", lambda: None)()
    except NotImplementedError:  # of a model of two towers
        embedding = None
    if embedding is None:
        embedding = next((m for m in model.modules() if isinstance(m, nn.Embedding) and _is_of_tokens(m, model)), None)
    weight = getattr(embedding, "weight", None)
    return cast(nn.Embedding, embedding) if weight is not None and weight.ndim == 2 else None


def token_count(model: nn.Module) -> int:
    """Return the number of tokens that a model knows, 0 for one that reads none."""
    embedding = input_embedding(model)
    return 0 if embedding is None else embedding.weight.shape[0]


def _is_of_tokens(module: nn.Embedding, model: nn.Module) -> bool:
    config = getattr(model, "config", None)
    return config is not None and module.num_embeddings == getattr(config.get_text_config(), "vocab_size", None)


def reads_text_only(model: nn.Module) -> bool:
    """Return True if token ids are all that a model needs."""
    return all(name in IDS for name in needed_inputs(model))


def needed_inputs(model: nn.Module) -> list[str]:
    """Return the names of the inputs that a model cannot do without.

    The main input; arguments of its ``forward`` without a default; the ids of a decoder; the text beside an image that
    is the main input of a model that continues text; and the other side of a model that compares two kinds of inputs,
    known by its ``return_loss``.
    """
    main = getattr(model, "main_input_name", "input_ids")
    parameters = inspect.signature(model.forward).parameters
    required = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    ]
    # An encoder that is a part of a larger class has the name of the main input of that, which it need not read.
    names = [name for name in ([main] if isinstance(main, str) else main) if name in parameters or not required]
    names += required
    encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if encoder_decoder and "decoder_input_ids" in parameters and not reads_whole_text(model):
        names.append("decoder_input_ids")
    if "pixel_values" in names and "input_ids" in parameters and predicts_tokens(model):
        names.append("input_ids")
    if "return_loss" in parameters:
        names += [name for name in ("input_ids", "pixel_values", "input_features") if name in parameters][:2]
    return list(dict.fromkeys(names))


def example_inputs(model: nn.Module, rows: int = 2, tokens: int = 16, seed: int = 0) -> Inputs:
    """Return the inputs that were given for a model, or draw random ones by its signature and its config.

    Returns:
        Token ids, LongTensor ``[rows, tokens]``, of a model that reads text; else, by name, images ``[rows, channels,
        height, width]`` or videos, spectrograms or waveforms in [-1, 1), and ids. A single row of a model that marks
        the places of images in its text.

    Raises:
        PrunerError: the model needs an input that cannot be guessed.
    """
    generator = torch.Generator().manual_seed(seed)
    device = next(iter(model.parameters())).device
    if model in _remembered:
        return _remembered[model].to(device)
    if reads_text_only(model):
        ids = _random_ids(model, rows, tokens, generator)
        return (ended(model, ids) if reads_whole_text(model) else ids).to(device)
    if predicts_tokens(model) and (image := inputs_with_image(model, 1, tokens, generator)):
        return image.to(device)
    drawn = {}
    for name in needed_inputs(model):
        if name in IDS:
            drawn[name] = ended(model, _random_ids(model, rows, tokens, generator))
            continue
        drawn[name] = torch.rand((rows, *input_shape(model, name)), generator=generator) * 2 - 1
    return ModelInputs(drawn).to(device)


def inputs_with_image(model: nn.Module, rows: int, tokens: int, generator: torch.Generator) -> ModelInputs | None:
    """Draw so many texts of random tokens, each with a random image in it.

    Returns:
        None for a model that takes no images in a way that its signature and config tell.
    """
    drawn = [draw_image_in_text(model, token_count(model), tokens, generator) for _ in range(rows)]
    return ModelInputs(*(part for part in drawn if part)) if all(drawn) else None


def _random_ids(model: nn.Module, rows: int, tokens: int, generator: torch.Generator) -> torch.Tensor:
    embedding = input_embedding(model)
    if embedding is None:
        raise PrunerError(f"{type(model).__name__} has no input embedding to feed tokens to")
    return torch.randint(0, embedding.weight.shape[0], (rows, tokens), generator=generator)


def reads_whole_text(model: nn.Module) -> bool:
    """Return True for an encoder-decoder that reads the whole text in its encoder, not a half in each of its parts.

    Classifiers and models that answer questions make the decoder's input of the text themselves, as BART's do, or have
    no decoder at all, as T5's classifier of tokens.
    """
    encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return bool(encoder_decoder) and task_name(model) in OF_WHOLE_TEXTS


def ended(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Return ids that end as a tokenizer ends them, and only there: some models read what they answer at that token.

    Ids that do so already are returned as they are.
    """
    end, embedding = getattr(model.config.get_text_config(), "eos_token_id", None), input_embedding(model)  # type: ignore[operator,union-attr]
    if not isinstance(end, int) or embedding is None or not 0 <= end < embedding.weight.shape[0]:
        return ids
    if bool((ids[:, -1] == end).all()) and len({*(ids == end).sum(1).tolist()}) == 1:
        return ids
    ids = torch.where(ids == end, end - 1 if end else 1, ids)
    ids[:, -1] = end
    return ids
