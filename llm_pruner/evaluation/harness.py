"""lm-eval's model class with batches that fit into memory, chosen before the first question."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..models.dispatch import free_bytes

SHARE = 0.25  # of the free memory, for the activations of a batch
LARGEST = 16  # requests per pass on a CPU, where larger batches only add padding


def requests_that_fit(model: PreTrainedModel, tokens: int) -> int:
    """Return the number of requests of so many tokens that a pass on a CPU takes, from the model's shape.

    A token takes its logits twice (lm-eval normalises a copy), and a key and a value in every layer.
    """
    config = model.config.get_text_config()
    depth = getattr(config, "num_hidden_layers", 1) or 1
    per_token = 4 * (2 * getattr(config, "vocab_size", 0) + 2 * depth * getattr(config, "hidden_size", 0))
    return max(1, min(LARGEST, int(SHARE * free_bytes(model.device) / (per_token * max(tokens, 1)))))


def language_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int | None) -> Any:
    """Return a model as lm-eval runs it.

    lm-eval's own search for a batch size runs batches of 64 sequences as long as the context, halved while they do not
    fit: fast on a GPU, minutes on a CPU. There the size follows from memory and the longest request, so that no pass is
    run for it. The methods are those of lm-eval 0.4.13.

    Args:
        batch_size: requests per pass; None: chosen.
    """
    from lm_eval.models.huggingface import HFLM

    class SizedLM(HFLM):
        """Model whose batches are sized by the requests."""

        def _loglikelihood_tokens(self, requests: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
            self._fit(max((len(context) + len(answer) for _, context, answer in requests), default=1))
            return super()._loglikelihood_tokens(requests, *args, **kwargs)  # type: ignore[arg-type]

        def generate_until(self, requests: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
            longest = max((len(self.tok_encode(request.args[0])) for request in requests), default=1)
            written = max((request.args[1].get("max_gen_toks") or self.max_gen_toks for request in requests), default=1)
            self._fit(longest + written)
            return super().generate_until(requests, *args, **kwargs)  # type: ignore[arg-type]

        def _fit(self, tokens: int) -> None:
            self.batch_size_per_gpu = requests_that_fit(model, min(tokens, self.max_length))

    searched = batch_size is not None or model.device.type != "cpu"
    backend = "seq2seq" if model.config.is_encoder_decoder else "causal"
    cls = HFLM if searched else SizedLM
    size = (batch_size or "auto") if searched else 1
    return cls(pretrained=model, tokenizer=tokenizer, backend=backend, batch_size=size)  # type: ignore[arg-type]
