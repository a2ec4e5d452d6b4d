"""``llm-pruner chat``: serve a page that sends one prompt to several models and shows their answers side by side.

The models answer one after the other, so that the tokens per second under each are those of that model alone.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextIteratorStreamer

from ..checkpoint.load import load_with_tokenizer
from ..checkpoint.locate import locate
from ..display import amount
from ..errors import PrunerError
from ..models.dispatch import resolve_device
from ..models.generate import Sampling, TokenClock, generate, pad_id
from ..models.running import context_length
from ..models.skeleton import parameter_count
from ..optional import require
from ..row_kinds import apply_template
from .arguments import ChatArguments

LONGEST_PROMPT = 20_000  # characters
TOKEN_TIMEOUT = 600.0  # seconds to wait for a token
TITLE = "llm-pruner chat"

Models = dict[str, tuple[PreTrainedModel, PreTrainedTokenizerBase]]  # by the name that the page shows


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An answer so far.

    Attributes:
        tokens: tokens generated.
        seconds: from the first token to the latest.
    """

    text: str = ""
    tokens: int = 0
    seconds: float = 0.0

    @property
    def speed(self) -> str:
        if self.tokens < 2 or not self.seconds:
            return ""
        return f"{(self.tokens - 1) / self.seconds:.1f} tokens/s ({self.tokens} tokens)"


@dataclass(frozen=True, kw_only=True)
class AnswerSettings:
    """Settings of an answer.

    Attributes:
        max_new_tokens: most tokens to generate.
        sampling: how to draw tokens; None: the most probable each time.
        use_chat_template: put the prompt into the tokenizer's chat template.
    """

    max_new_tokens: int = 128
    sampling: Sampling | None = None
    use_chat_template: bool = False


def answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, settings: AnswerSettings | None = None
) -> Iterator[Answer]:
    """Yield a growing answer to a prompt. Closing the iterator stops the model.

    Raises:
        PrunerError: the prompt is empty or too long, or the model cannot generate.
    """
    settings = settings or AnswerSettings()
    inputs = _tokenize(model, tokenizer, prompt, settings.use_chat_template)
    writer = _Writer(model, tokenizer, inputs, settings)
    writer.start()
    text = ""
    try:
        for part in writer.streamer:
            text += part
            yield Answer(text=text, tokens=writer.clock.tokens, seconds=writer.clock.seconds)
        writer.join()
        if writer.error is not None:
            raise PrunerError(f"the model stopped: {writer.error}") from writer.error
        yield Answer(text=text, tokens=writer.clock.tokens, seconds=writer.clock.seconds)
    finally:
        writer.clock.stopped = True
        writer.join()


class _Writer(threading.Thread):
    """Generate in a thread; its tokens come out of ``streamer``."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        inputs: dict[str, torch.Tensor],
        settings: AnswerSettings,
    ):
        super().__init__(daemon=True)
        self.model, self.inputs, self.settings, self.pad_token = model, inputs, settings, pad_id(tokenizer)
        self.clock = TokenClock()
        self.streamer = TextIteratorStreamer(
            cast(Any, tokenizer), skip_prompt=True, timeout=TOKEN_TIMEOUT, skip_special_tokens=True
        )
        self.error: Exception | None = None

    def run(self) -> None:
        room, context = self.settings.max_new_tokens, context_length(self.model)
        if context is not None and not self.model.config.is_encoder_decoder:
            room = min(room, context - self.inputs["input_ids"].shape[1])
        try:
            generate(
                self.model,
                self.inputs["input_ids"],
                new_tokens=room,
                sampling=self.settings.sampling,
                attention_mask=self.inputs["attention_mask"],
                pad_token=self.pad_token,
                clock=self.clock,
                streamer=self.streamer,
            )
        except Exception as error:  # it has to reach the thread that reads
            self.error = error
            self.streamer.end()


def _tokenize(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, use_chat_template: bool
) -> dict[str, torch.Tensor]:
    """Return ids and attention mask of a prompt, on the model's device."""
    if not prompt.strip():
        raise PrunerError("write a prompt first")
    if len(prompt) > LONGEST_PROMPT:
        raise PrunerError(f"the prompt has {len(prompt):,} characters, at most {LONGEST_PROMPT:,} are read")
    if use_chat_template and tokenizer.chat_template:
        message = [{"role": "user", "content": prompt}]
        ids = apply_template(tokenizer, message, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        ids = tokenizer(prompt, return_tensors="pt")
    longest, count = context_length(model), cast(Any, ids)["input_ids"].shape[1]
    if longest is not None and count >= longest:
        raise PrunerError(f"the prompt has {count:,} tokens, the model reads at most {longest:,}: shorten it")
    return {name: cast(Any, ids)[name].to(model.device) for name in ("input_ids", "attention_mask")}


def serve_chat(args: ChatArguments) -> None:
    """Load the models and serve the page until it is interrupted.

    Raises:
        PrunerError: bad arguments, or gradio is not installed.
    """
    names = args.models_to_serve()
    require("gradio", "chat", "the page needs")
    for name in names:
        locate(name)
    device = resolve_device(args.device, "--device")
    print(f"loading {', '.join(names)} ...", flush=True)
    models = {
        _short_name(name, names): load_with_tokenizer(name, args.dtype, device, args.trust_remote_code)
        for name in names
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
            max_file_size=1,  # the page takes no files; gradio would
        )
    except OSError as error:
        raise PrunerError(f"cannot serve on {args.host}:{args.port}: {error}; give another --port") from error


def page_of(models: Models) -> tuple[Any, Any]:
    """Build gradio's theme and page for models and tokenizers by name."""
    import gradio as gr

    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # none from the network
    theme.set(block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300")  # the default is faint
    with gr.Blocks(title=TITLE, analytics_enabled=False) as page:
        gr.Markdown(f"# {TITLE}\n{_introduction(len(models))}", elem_id="title")
        prompt = gr.Textbox(
            label="Prompt",
            info="Enter sends, Shift+Enter begins a new line.",
            lines=1,  # of a box with more, gradio sends by Shift+Enter
            max_lines=10,
            max_length=LONGEST_PROMPT,
            elem_id="prompt",
            placeholder="The capital of France is",
            autofocus=True,
        )
        with gr.Row():
            ask = gr.Button("Generate", variant="primary", elem_id="generate", scale=3, min_width=120)
            stop = gr.Button("Stop", elem_id="stop", scale=1, min_width=80)
        controls = _controls(gr, any(tokenizer.chat_template for _, tokenizer in models.values()))
        answers, speeds = _answer_boxes(gr, models)
        outputs = [box for pair in zip(answers, speeds, strict=True) for box in pair]

        def respond(text: str, *values: Any) -> Iterator[list[str]]:
            try:
                yield from _answer_all(models, text, _settings_of(*values))
            except PrunerError as error:
                raise gr.Error(escape(str(error)), print_exception=False) from error  # gradio takes it for HTML

        started = gr.on(
            [ask.click, prompt.submit],
            respond,
            [prompt, *controls],
            outputs,
            concurrency_limit=1,
            show_progress_on=answers,
        )
        stop.click(None, cancels=[started])
    return theme, page.queue(max_size=16)


def _introduction(count: int) -> str:
    if count == 1:
        return "Write a prompt, and the model continues or answers it."
    return (
        "Write a prompt and compare the answers. The models answer one after the other, so that their speeds compare."
    )


def _answer_boxes(gr: Any, models: Models) -> tuple[list[Any], list[Any]]:
    """Build a column for each model: its answer under its title, and the speed of the answer."""
    answers, speeds = [], []
    with gr.Row(equal_height=True):
        for i, title in enumerate(titles_of(models)):
            with gr.Column():
                answers.append(
                    gr.Textbox(label=title, lines=12, interactive=False, buttons=["copy"], elem_id=f"answer{i}")
                )
                speeds.append(gr.Markdown("", elem_id=f"speed{i}"))
    return answers, speeds


def titles_of(models: Models) -> list[str]:
    """Return name and size of each model; from the second on, also the share of the first one's parameters."""
    counts = [parameter_count(model) for model, _ in models.values()]
    first = next(iter(models))
    titles = [f"{name} - {amount(count)} parameters" for name, count in zip(models, counts, strict=True)]
    return titles[:1] + [f"{title}, {count / counts[0]:.2f} of {first}" for title, count in zip(titles[1:], counts[1:])]


def _controls(gr: Any, templated: bool) -> list[Any]:
    """Build the controls of :func:`_settings_of`, in its order."""
    with gr.Accordion("Sampling", open=False):
        return [
            gr.Slider(1, 2048, 128, step=1, label="Most new tokens"),
            gr.Slider(0, 2, 0, step=0.05, label="Temperature (0: always the most probable token)"),
            gr.Slider(0.05, 1, 0.95, step=0.05, label="Top p"),
            gr.Slider(0, 200, 50, step=1, label="Top k (0: all)"),
            gr.Checkbox(templated, label="Use the chat template", interactive=templated),
        ]


def _settings_of(new_tokens: float, temperature: float, top_p: float, top_k: float, chat: bool) -> AnswerSettings:
    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=int(top_k)) if temperature > 0 else None
    return AnswerSettings(max_new_tokens=int(new_tokens), sampling=sampling, use_chat_template=chat)


def _answer_all(models: Models, prompt: str, settings: AnswerSettings) -> Iterator[list[str]]:
    """Yield text and speed of every model, again and again as its answer grows."""
    shown = [""] * (2 * len(models))
    yield shown
    for i, (model, tokenizer) in enumerate(models.values()):
        for partial in answer(model, tokenizer, prompt, settings):
            shown[2 * i : 2 * i + 2] = partial.text, partial.speed
            yield shown


def _short_name(name: str, names: list[str]) -> str:
    """Return the last part of a name where that is unique among all names."""

    def last_part(path: str) -> str:
        return Path(path).name

    return last_part(name) if [last_part(n) for n in names].count(last_part(name)) == 1 else name
