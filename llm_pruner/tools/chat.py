"""A page where one prompt goes to several models, their answers side by side as they are written.

The models answer one after the other, so that the tokens per second under each are what it does alone.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, cast

from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from ..checkpoint.load import load_with_tokenizer
from ..checkpoint.locate import locate
from ..errors import PrunerError
from ..models.dispatch import resolve_device
from ..models.generate import pad_id
from ..models.running import context_length, evaluating
from .arguments import ChatArguments

LONGEST_PROMPT = 20_000  # characters
PATIENCE = 600.0  # seconds to wait for a token


@dataclass
class Answer:
    """What a model has written so far.

    Attributes:
        tokens: how many; ``seconds`` is the time since the first of them, in which all but that one came.
    """

    text: str = ""
    tokens: int = 0
    seconds: float = 0.0

    @property
    def speed(self) -> str:
        if self.tokens < 2 or not self.seconds:
            return ""
        return f"{(self.tokens - 1) / self.seconds:.1f} tokens/s ({self.tokens} tokens)"


@dataclass
class Sampling:
    """How to go on with a text; at temperature 0 the most probable token comes each time."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 0.95
    top_k: int = 50
    chat: bool = False


def answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, how: Sampling | None = None
) -> Iterator[Answer]:
    """What a model writes, again and again as it grows. To close the iterator stops the model.

    Raises:
        PrunerError: a prompt that is empty or too long.
    """
    how = how or Sampling()
    ids = _read(model, tokenizer, prompt, how.chat)
    streamer = TextIteratorStreamer(cast(Any, tokenizer), skip_prompt=True, timeout=PATIENCE, skip_special_tokens=True)
    watch = _Watch()
    longest, room = context_length(model), how.max_new_tokens
    if longest is not None and not model.config.is_encoder_decoder:
        room = longest - ids["input_ids"].shape[1]
    options: dict[str, Any] = {"do_sample": how.temperature > 0, "max_new_tokens": min(how.max_new_tokens, room)}
    options["num_beams"] = 1  # what is written has to be known as it is
    if how.temperature > 0:
        options |= {"temperature": how.temperature, "top_p": how.top_p, "top_k": how.top_k}

    def write() -> None:
        try:
            with evaluating(model):
                cast(Any, model).generate(
                    **ids,
                    **options,
                    pad_token_id=pad_id(tokenizer),
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([watch]),
                )
        except Exception as error:  # it has to reach the thread that reads
            watch.error = error
            streamer.end()

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    text = ""
    try:
        for part in streamer:
            text += part
            yield Answer(text, watch.tokens, watch.seconds)
        writer.join()
        if watch.error is not None:
            raise PrunerError(f"the model stopped: {watch.error}") from watch.error
        yield Answer(text, watch.tokens, watch.seconds)
    finally:
        watch.stop = True
        writer.join()


class _Watch(StoppingCriteria):
    """Counts tokens and their time, and stops the writing when nobody reads any more."""

    def __init__(self) -> None:
        self.tokens, self.seconds, self.stop = 0, 0.0, False
        self.error: Exception | None = None
        self._first = 0.0

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        now = time.perf_counter()
        self._first = self._first or now
        self.tokens, self.seconds = self.tokens + 1, now - self._first
        return input_ids.new_full((input_ids.shape[0],), self.stop, dtype=bool)


def _read(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool) -> Any:
    if not prompt.strip():
        raise PrunerError("write a prompt first")
    if len(prompt) > LONGEST_PROMPT:
        raise PrunerError(f"the prompt has {len(prompt):,} characters, at most {LONGEST_PROMPT:,} are read")
    if chat and tokenizer.chat_template:
        message = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        ids = tokenizer(prompt, return_tensors="pt")
    longest, count = context_length(model), cast(Any, ids)["input_ids"].shape[1]
    if longest is not None and count >= longest:
        raise PrunerError(f"the prompt has {count:,} tokens, the model reads at most {longest:,}")
    return {name: cast(Any, ids)[name].to(model.device) for name in ("input_ids", "attention_mask")}


def serve_chat(args: ChatArguments) -> None:
    """Load the models and serve the page until it is interrupted.

    Raises:
        PrunerError: bad arguments, or gradio is not installed.
    """
    names = args.models_to_serve()
    if find_spec("gradio") is None:
        raise PrunerError("the page needs gradio: pip install gradio")
    for name in names:
        locate(name)
    device = resolve_device(args.device, "--device")
    models = {
        _title(name, names): load_with_tokenizer(name, args.dtype, device, args.trust_remote_code) for name in names
    }
    theme, page = page_of(models)
    print(f"serving on http://{args.host}:{args.port}" + (" and a public address" if args.share_gradio else ""))
    try:
        page.launch(
            server_name=args.host,
            server_port=args.port,
            share=args.share_gradio,
            theme=theme,
            footer_links=[],
            quiet=True,
        )
    except OSError as error:
        raise PrunerError(f"cannot serve on {args.host}:{args.port}: {error}; give another --port") from error


def page_of(models: dict[str, tuple[PreTrainedModel, PreTrainedTokenizerBase]]) -> tuple[Any, Any]:
    """Theme and page of gradio for models and tokenizers by name."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    import gradio as gr

    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # none from the network
    with gr.Blocks(title="llm-pruner", analytics_enabled=False) as page:
        prompt = gr.Textbox(
            label="Prompt", lines=3, max_length=LONGEST_PROMPT, elem_id="prompt", placeholder="The capital of France is"
        )
        with gr.Row():
            ask = gr.Button("Generate", variant="primary", elem_id="generate")
            stop = gr.Button("Stop", elem_id="stop")
        with gr.Accordion("Sampling", open=False):
            length = gr.Slider(1, 2048, 128, step=1, label="New tokens at most")
            temperature = gr.Slider(0, 2, 0, step=0.05, label="Temperature (0: the most probable token)")
            top_p = gr.Slider(0.05, 1, 0.95, step=0.05, label="Top p")
            top_k = gr.Slider(0, 200, 50, step=1, label="Top k (0: all)")
            templated = any(tokenizer.chat_template for _, tokenizer in models.values())
            as_chat = gr.Checkbox(templated, label="Use the chat template", interactive=templated)
        shown: list[Any] = []
        with gr.Row(equal_height=True):
            for i, name in enumerate(models):
                with gr.Column():
                    said = gr.Textbox(label=name, lines=12, interactive=False, buttons=["copy"], elem_id=f"answer{i}")
                    speed = gr.Markdown("", elem_id=f"speed{i}")
                    shown += [said, speed]

        def respond(
            text: str, new_tokens: int, heat: float, nucleus: float, most: int, chat: bool
        ) -> Iterator[list[str]]:
            how = Sampling(int(new_tokens), heat, nucleus, int(most), chat)
            out = [""] * len(shown)
            yield out
            for i, (model, tokenizer) in enumerate(models.values()):
                try:
                    for found in answer(model, tokenizer, text, how):
                        out[2 * i : 2 * i + 2] = found.text, found.speed
                        yield out
                except PrunerError as error:
                    raise gr.Error(str(error)) from error

        inputs = [prompt, length, temperature, top_p, top_k, as_chat]
        started = gr.on([ask.click, prompt.submit], respond, inputs, shown, concurrency_limit=1)
        stop.click(None, cancels=[started])
    return theme, page.queue(max_size=16)


def _title(name: str, names: list[str]) -> str:
    """The last part of a name where that tells the models apart."""
    last: Callable[[str], str] = lambda n: n.rstrip("/").rpartition("/")[2]  # noqa: E731
    return last(name) if [last(n) for n in names].count(last(name)) == 1 else name
