"""Run a model: inputs, modes, implementations, context length."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import PrunerError
from .inputs import (
    IDS,
    Inputs,
    ModelInputs,
    as_inputs,
    check_inputs,
    ended,
    input_embedding,
    reads_text_only,
    reads_whole_text,
)
from .per_layer import IMPLEMENTATION_SLOTS
from .tasks import predicts_tokens
from .torch_internals import TorchDispatchMode

ROUTER_LOSS = "output_router_logits"  # field of configs with an auxiliary loss of routers


def answer_on_meta(operator: str, args: Any) -> bool | None:
    """Return the answer to a model that reads a value on the meta device, None for operators that read no value.

    Models ask whether nothing is padded; the answer is yes.
    """
    if operator == "_local_scalar_dense" and args[0].device.type == "meta":
        return bool(args[0].dtype is torch.bool)
    return None


class MetaReads(TorchDispatchMode):
    """A mode in which models on the meta device can read values; see :func:`answer_on_meta`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = answer_on_meta(func.overloadpacket.__name__, args)
        return func(*args, **(kwargs or {})) if answer is None else answer


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run a model in eval mode; restore every module's own mode afterwards."""
    training = [m for m in model.modules() if m.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def implementations(model: nn.Module, **chosen: Any) -> Iterator[None]:
    """Choose how blocks run, as in ``experts="eager"``, and values of other fields, for the length of the block.

    Every module's own config is set, because a layer's config may be another than the model's.
    """
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    saved: list[tuple[Any, str, Any]] = []
    try:
        for config in configs.values():
            for block, value in chosen.items():
                slot = IMPLEMENTATION_SLOTS.get(block, block)
                if hasattr(config, slot) and (block in IMPLEMENTATION_SLOTS or slot in config.__dict__):
                    saved.append((config, slot, config.__dict__.get(slot)))
                    config.__dict__[slot] = value
        yield
    finally:
        for config, slot, value in saved:
            config.__dict__[slot] = value


@contextmanager
def tracing_mode(model: nn.Module) -> Iterator[None]:
    """Run attention eagerly and experts batched, in eval mode: both show the axes that fused kernels hide.

    The auxiliary loss of routers is left out: it joins the experts of all layers.
    """
    with evaluating(model), implementations(model, attn="eager", experts="batched_mm", **{ROUTER_LOSS: False}):
        yield


def stored_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors that a checkpoint holds by their first names: parameters and persistent float buffers.

    Tensors that transformers does not save, such as tables of sines, are left out: they are computed anew.
    """
    tensors: dict[str, torch.Tensor] = dict(model.named_parameters())
    transient = {f"{p}.{n}".lstrip(".") for p, m in model.named_modules() for n in m._non_persistent_buffers_set}
    for name, buffer in model.named_buffers():
        if name not in transient and buffer.is_floating_point():
            tensors[name] = buffer
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    return {name: tensor for name, tensor in tensors.items() if name not in ignored}


def without_cache(model: nn.Module) -> dict[str, bool]:
    """Return the argument that lets a model keep no cache; none for a classifier that says so to its inner model."""
    parameters = inspect.signature(model.forward).parameters
    passed_on = predicts_tokens(model) and any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    takes_it = "use_cache" in parameters or passed_on
    return {"use_cache": False} if takes_it else {}


def model_inputs(model: nn.Module, ids: Inputs) -> dict[str, torch.Tensor]:
    """Return token ids ``[rows, tokens]``, or a batch of other inputs, as arguments of the model.

    An encoder-decoder reads the first half of each row in its encoder and the second in its decoder: it predicts how
    the text goes on. A classifier or a model that answers questions reads the whole text, ended as it expects.
    """
    if isinstance(ids, ModelInputs):
        dtype = next(model.parameters()).dtype
        return {name: t.to(dtype) if t.is_floating_point() else t for name, t in ids.tensors().items()}
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return {"input_ids": ids}
    if reads_whole_text(model):
        return {"input_ids": ids if ids.device.type == "meta" else ended(model, ids)}
    half = ids.shape[1] // 2
    return {"input_ids": ids[:, :half], "decoder_input_ids": ids[:, half:]}


def context_length(model: nn.Module) -> int | None:
    """Return the model's context length in tokens, None if its config does not state it.

    Where the positions of tokens begin after that of padding, as RoBERTa's do, the rows up to there hold no token.
    """
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)  # type: ignore[operator,union-attr]
    if not isinstance(longest, int):
        return None
    for name, module in model.named_modules():
        padding = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and padding is not None:
            return longest - padding - 1
    return longest


def target_ids(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the ids among :func:`model_inputs` that the model's logits belong to."""
    return inputs.get("decoder_input_ids", inputs["input_ids"])


def main_output(output: Any) -> torch.Tensor:
    """Return the main tensor of a model's output.

    The main tensor is: logits ``[rows, tokens, vocabulary]`` or ``[rows, classes]``; for question answering, the logits
    of starts and ends ``[rows, tokens, 2]``; for a model that compares texts with images or sounds, the embeddings
    ``[rows, sides x size]``; for a model without a head, the last hidden states ``[rows, tokens, hidden]``.
    """
    if getattr(output, "start_logits", None) is not None:
        return torch.stack([output.start_logits, output.end_logits], dim=-1)
    sides = [getattr(output, name, None) for name in ("text_embeds", "image_embeds", "audio_embeds")]
    if embeddings := [side for side in sides if torch.is_tensor(side)]:
        return torch.cat(embeddings, dim=-1)
    names = ("logits", "prediction_logits", "predicted_depth", "last_hidden_state")
    tensor = next((value for name in names if (value := getattr(output, name, None)) is not None), None)
    tensor = output[0] if tensor is None else tensor
    if not torch.is_tensor(tensor):
        raise PrunerError(f"the model's output is several tensors or none: {type(output).__name__} is not compared")
    return tensor


def forward(model: nn.Module, ids: Inputs) -> Any:
    """Run a model on token ids ``[rows, tokens]`` or a batch of other inputs without a cache; return its output."""
    return model(**model_inputs(model, ids), **without_cache(model))


@contextmanager
def equal_draws() -> Iterator[None]:
    """Give a model that draws random numbers, such as a mask, the same numbers whenever it runs in the block."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(0)
        yield


@torch.no_grad()
def logits(model: nn.Module, ids: Inputs) -> torch.Tensor:
    """Return a model's :func:`main_output` in fp32."""
    with equal_draws():
        return main_output(forward(model, ids)).float()


def relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return ``max |a - b| / max |b|``; infinity if either is not finite."""
    if not (a.isfinite().all() and b.isfinite().all()):
        return float("inf")
    return ((a - b).abs().max() / b.abs().max().clamp_min(1e-12)).item()


def check_calibration(model: PreTrainedModel, calibration: Any) -> Inputs:
    """Return the calibration set after checking that the model can read it.

    Args:
        calibration: token ids, LongTensor ``[samples, tokens]``; or inputs by name, as a processor returns them.

    Raises:
        PrunerError: it is missing, of another type or shape, has token ids or a length that the model cannot read, or
            text with padding that a loss would count.
    """
    calibration = as_inputs(calibration)
    if isinstance(calibration, ModelInputs):
        check_inputs(model, calibration)
        check_ids(model, calibration, "calibration")
        if predicts_tokens(model) and reads_text_only(model) and any(_is_padded(part) for part in calibration.parts):
            raise PrunerError(
                "calibration samples are padded (attention_mask has 0), and the loss of a text would count padding: "
                "give samples of one length"
            )
        return calibration
    needs = "a LongTensor [samples, tokens]" if reads_text_only(model) else "inputs by name, as its processor returns"
    if calibration is None:
        raise PrunerError(f"this criterion needs a calibration set: {needs}")
    if not reads_text_only(model):
        raise PrunerError(f"a calibration set of {type(model).__name__} must be {needs}, not token ids alone")
    if not isinstance(calibration, torch.Tensor):
        raise PrunerError(f"calibration must be a LongTensor of token ids, not {type(calibration).__name__}")
    if calibration.ndim != 2 or calibration.is_floating_point() or calibration.shape[0] < 1 or calibration.shape[1] < 2:
        raise PrunerError(
            f"calibration must be a LongTensor [samples >= 1, tokens >= 2], not {calibration.dtype} "
            f"{list(calibration.shape)}"
        )
    if model.config.is_encoder_decoder and calibration.shape[1] < 3:
        raise PrunerError("an encoder-decoder predicts one half of a sample from the other: give 3 tokens or more")
    check_ids(model, calibration, "calibration")
    return calibration


def _is_padded(tensors: dict[str, torch.Tensor]) -> bool:
    masks = [tensors[name] for name in ("attention_mask", "decoder_attention_mask") if name in tensors]
    return any(mask.ndim == 2 and not bool(mask.all()) for mask in masks)


def check_ids(model: PreTrainedModel, inputs: Inputs, name: str) -> None:
    """Refuse token ids that are none, that the model has no embedding of, or no positions for.

    Args:
        name: name of the argument, for messages; ids among inputs by name have names of their own.

    Raises:
        PrunerError: ids are not ``[samples, tokens]`` of whole numbers, out of the vocabulary, or too many.
    """
    if isinstance(inputs, ModelInputs):
        for part in inputs.parts:
            for own_name in sorted(IDS & part.keys()):
                check_ids(model, part[own_name], own_name)
        return
    if inputs.ndim < 2 or inputs.is_floating_point() or not inputs.numel():
        shape = f"{inputs.dtype} {list(inputs.shape)}"
        raise PrunerError(f"{name} must be a LongTensor [samples >= 1, tokens >= 1] of token ids, not {shape}")
    embedding = input_embedding(model)
    size = 2**63 if embedding is None else cast(torch.Tensor, embedding.weight).shape[0]
    lowest, highest = int(inputs.min()), int(inputs.max())
    if lowest < 0 or highest >= size:
        raise PrunerError(
            f"{name} has token id {lowest if lowest < 0 else highest}, the model a vocabulary of {size}: it was made "
            "with another tokenizer"
        )
    longest = context_length(model)
    if longest is not None and inputs.shape[-1] > longest:
        raise PrunerError(f"{name} samples have {inputs.shape[-1]} tokens, the model reads at most {longest}")
