"""Generate text."""

from __future__ import annotations

from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .running import evaluating


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """What fills up a batch when text is generated; a tokenizer without a token for that uses its last."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id  # type: ignore[return-value]


@torch.no_grad()
def continue_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, new_tokens: int) -> str:
    """What a model writes after a prompt."""
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    with evaluating(model):
        out = cast(Any, model).generate(
            **inputs, do_sample=False, max_new_tokens=new_tokens, pad_token_id=pad_id(tokenizer)
        )
    start = 0 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    return str(tokenizer.decode(out[0, start:], skip_special_tokens=True))
