"""Training data: what a data set's rows say, and how they become token ids and labels.

Four kinds of rows are known by their columns: chats (``messages`` or ``conversations``), instructions (``instruction``,
perhaps ``input``, and ``output`` or ``response``), pairs (``prompt`` and ``completion`` or ``response``) and plain
text. Of the first three only the answers are learnt. Text is packed into windows without padding, and so are the others
where that is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ..data import EMBEDDED_TEXT, HUB, documents
from ..errors import PrunerError
from ..files import digest
from ..logs import log
from .objectives import Example, Vocabulary, denoised
from .prompts import plain, prompt

AT_ONCE = 200_000  # documents of a hub text that are read without --streaming, at most
IGNORED = -100  # labels that no loss is taken of
TEXTS = ("text", "content", "sentence")
ANSWERS = ("output", "response", "completion", "answer", "chosen")
CHATS = ("messages", "conversations")
FILES = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
Record = dict[str, Any]


@dataclass(frozen=True)
class Format:
    """How rows are told and what of them is learnt.

    Attributes:
        cutoff_len: tokens of an example at most, and of a packed window exactly.
        template: of an instruction, see :mod:`llm_pruner.recovery.prompts`; None for no template.
        train_on_inputs: learn the prompts too.
        add_eos_token: count the end-of-text token of a prompt tokenized on its own, as LLM-Pruner's flag does.
        encoder_decoder: prompts go to the encoder, answers to the decoder.
        objective: what an encoder-decoder makes of text, see :mod:`llm_pruner.recovery.objectives`; with ``causal`` it
            reads the first half of a window and writes the second.
        seed: of the denoisers.
        packing: put answered prompts one after the other into windows of ``cutoff_len`` tokens, instead of each into an
            example of its own.
    """

    cutoff_len: int = 256
    template: str | None = "alpaca"
    train_on_inputs: bool = False
    add_eos_token: bool = False
    encoder_decoder: bool = False
    objective: str = "causal"
    seed: int = 0
    packing: bool = False

    @property
    def longest(self) -> int | None:
        """Tokens of an answered prompt at most; one that goes on in the next window is cut nowhere."""
        return None if self.packing else self.cutoff_len


def rows(source: str, streaming: bool = False) -> Any:
    """A data set's training rows, as a ``datasets.Dataset`` (an ``IterableDataset`` when streaming).

    Args:
        source: ``python-docs``, a text by name (``wikitext2``, ``ptb``, ``c4``, ``bookcorpus``), a local ``.json``,
            ``.jsonl``, ``.parquet``, ``.csv`` or ``.txt`` file, or a data set on the hub.

    Raises:
        PrunerError: it cannot be read, or is empty.
    """
    import datasets

    path = Path(source).expanduser()
    if source in HUB or source == EMBEDDED_TEXT or (path.suffix == ".txt" and path.is_file()):
        if streaming:
            return datasets.IterableDataset.from_generator(_texts, gen_kwargs={"source": source})
        texts = list(documents(source, "train", AT_ONCE))
        if source in HUB and len(texts) == AT_ONCE:
            log.info("%s: the first %d documents; --streaming reads on", source, AT_ONCE)
        return datasets.Dataset.from_dict({"text": texts})
    try:
        if path.is_file():
            if path.suffix not in FILES:
                raise PrunerError(f"cannot read {source}: give a {', '.join(FILES)} or .txt file")
            found = datasets.load_dataset(FILES[path.suffix], data_files=str(path), split="train", streaming=streaming)
        elif path.exists() or source.count("/") > 1 or source.startswith((".", "/", "~")):
            raise PrunerError(f"there is no data file {source}")
        else:
            found = datasets.load_dataset(source, split="train", streaming=streaming)
    except PrunerError:
        raise
    except Exception as error:  # the loaders of a dozen formats, and the network
        why = " ".join(str(error).split())[:200]
        raise PrunerError(f"cannot read the data set {source}: {type(error).__name__}: {why}") from error
    if not streaming and not len(found):
        raise PrunerError(f"the data set {source} is empty")
    return found


def _texts(source: str) -> Iterator[Record]:
    for document in documents(source, "train"):
        yield {"text": document}


def kind_of(columns: Iterable[str], source: str) -> str:
    """``chat``, ``instruction``, ``pair`` or ``text``.

    Raises:
        PrunerError: none of them; the message names the columns found.
    """
    found = set(columns)
    if found & set(CHATS):
        return "chat"
    if "instruction" in found and found & set(ANSWERS):
        return "instruction"
    if found & {"prompt", "question"} and found & set(ANSWERS):
        return "pair"
    if found & set(TEXTS):
        return "text"
    raise PrunerError(
        f"{source} has the columns {', '.join(sorted(found)) or 'none'}; needed are instruction and output, prompt and "
        "completion, messages, or text"
    )


def tokenized(data: Any, tokenizer: PreTrainedTokenizerBase, form: Format, source: str) -> Any:
    """A data set of ``input_ids`` and ``labels``, lists of at most ``cutoff_len`` token ids.

    Rows without an answer, or whose prompt alone fills ``cutoff_len``, teach nothing and are left out.
    """
    import datasets

    streaming = isinstance(data, datasets.IterableDataset)
    columns = tuple(data.column_names or next(iter(data)))  # datasets would deal a list out to several readers
    kind = kind_of(columns, source)
    example = _example_maker(kind, columns, tokenizer, form)  # a stream would refuse what it cannot make only when read
    if kind == "text" or form.packing:
        made_of = {"data": data, "kind": kind, "columns": columns, "tokenizer": tokenizer, "form": form}
        if streaming:
            return datasets.IterableDataset.from_generator(_windows, gen_kwargs=made_of)
        windows = list(_windows(**made_of))
        if not windows:
            raise PrunerError(f"{source} does not fill one window of {form.cutoff_len} tokens: lower --cutoff_len")
        return datasets.Dataset.from_list(windows)
    how: dict[str, bool] = {} if streaming else {"keep_in_memory": True, "load_from_cache_file": False}
    found = data.map(example, remove_columns=list(columns), **how).filter(_teaches, **how)
    if not streaming and len(found) < len(data):
        log.info(
            "%s: %d of %d rows have no answer within %d tokens",
            source,
            len(data) - len(found),
            len(data),
            form.cutoff_len,
        )
        if not len(found):
            raise PrunerError(f"no row of {source} has an answer within {form.cutoff_len} tokens: raise --cutoff_len")
    return found


def _teaches(example: Example) -> bool:
    return any(label != IGNORED for label in example["labels"])


def _windows(
    data: Iterable[Record], kind: str, columns: tuple[str, ...], tokenizer: PreTrainedTokenizerBase, form: Format
) -> Iterator[Example]:
    """Examples one after the other, each ended by the end-of-text token, cut into windows of equal length."""
    example = _example_maker(kind, columns, tokenizer, form)
    windows = _cut((example(row) for row in data), form.cutoff_len)
    if form.objective != "causal":
        yield from denoised((w["input_ids"] for w in windows), form.objective, Vocabulary.of(tokenizer), form.seed)
        return
    half = form.cutoff_len // 2
    for window in windows:
        if form.encoder_decoder:
            ids = window["input_ids"]
            yield {"input_ids": ids[:half], "labels": ids[half:]}
        elif _teaches(window):
            yield window


def _cut(examples: Iterable[Example], length: int) -> Iterator[Example]:
    rest: Example = {"input_ids": [], "labels": []}
    for example in examples:
        if not _teaches(example):
            continue
        for name, ids in rest.items():
            ids += example[name]
        full = len(rest["labels"]) // length * length
        for start in range(0, full, length):
            yield {name: ids[start : start + length] for name, ids in rest.items()}
        rest = {name: ids[full:] for name, ids in rest.items()}


def _example_maker(
    kind: str, columns: tuple[str, ...], tokenizer: PreTrainedTokenizerBase, form: Format
) -> Callable[[Record], Example]:
    """What makes an example of a row of this kind."""
    if kind == "text":
        column = next(name for name in TEXTS if name in columns)
        return lambda row: _document(str(row[column] or ""), tokenizer)
    if form.objective != "causal":
        raise PrunerError(
            f"--objective {form.objective} denoises plain text, and the data holds more: give text or causal"
        )
    if form.encoder_decoder and form.train_on_inputs:
        raise PrunerError("--train_on_inputs is for decoders: an encoder-decoder reads its prompts")
    if form.encoder_decoder and form.packing:
        raise PrunerError("--packing is for decoders: an encoder-decoder reads prompts and writes answers apart")
    if kind == "chat":
        if tokenizer.chat_template is None:
            raise PrunerError("the data set holds chats and the tokenizer has no chat template: give another data set")
        if form.encoder_decoder:
            raise PrunerError("chats are for decoder models: give an encoder-decoder instructions or text")
        return lambda row: _chat(row, tokenizer, form)
    as_prompt = plain if form.template is None else prompt(form.template)

    def example(row: Record) -> Example:
        answer = next((str(row[name] or "") for name in ANSWERS if name in row), "")
        if kind == "instruction":
            question = as_prompt(str(row["instruction"] or ""), str(row.get("input") or ""))
        else:
            question = str(row.get("prompt") or row.get("question") or "")
        joint = " " if kind == "instruction" and form.template is None else ""
        # Tokenizers join a blank to the word behind it: one that ends a prompt is learnt with the answer.
        prompted = question.rstrip(" ")
        joint = question[len(prompted) :] + joint
        return _answered(prompted, joint + answer if answer.strip() else "", tokenizer, form)

    return example


def _document(text: str, tokenizer: PreTrainedTokenizerBase) -> Example:
    """All of a text, and its end, to be learnt."""
    ids = list(tokenizer(text, truncation=False, verbose=False)["input_ids"])
    if tokenizer.eos_token_id is not None and ids and ids[-1] != tokenizer.eos_token_id:
        ids.append(cast(int, tokenizer.eos_token_id))
    return {"input_ids": ids, "labels": list(ids)}


def _answered(question: str, answer: str, tokenizer: PreTrainedTokenizerBase, form: Format) -> Example:
    """A prompt and its answer; labels are those of the answer and of the end (LLM-Pruner's ``post_training.py``)."""

    def ids(text: str, end: bool) -> list[int]:
        cut = {"truncation": True, "max_length": form.longest} if form.longest else {"truncation": False}
        found = list(tokenizer(text, verbose=False, **cut)["input_ids"])  # type: ignore[arg-type]
        eos = tokenizer.eos_token_id
        if end and eos is not None and not (form.longest and len(found) >= form.longest) and found[-1:] != [eos]:
            found.append(cast(int, eos))
        return found

    if not answer.strip():
        return {"input_ids": [], "labels": []}
    if form.encoder_decoder:
        return {"input_ids": ids(question, True), "labels": ids(answer, True)}
    whole = ids(question + answer, True)
    if form.train_on_inputs:
        return {"input_ids": whole, "labels": list(whole)}
    known = len(ids(question, form.add_eos_token)) - int(form.add_eos_token)
    return {"input_ids": whole, "labels": [IGNORED] * min(known, len(whole)) + whole[known:]}


def _chat(row: Record, tokenizer: PreTrainedTokenizerBase, form: Format) -> Example:
    """A conversation by the tokenizer's chat template; labels are those of the assistant's turns."""
    messages = _messages(row)
    pieces: list[tuple[str, bool]] = []
    before = ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant" or i == 0:  # an answer to nothing teaches nothing
            continue
        try:
            opened = str(tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True))
            closed = str(tokenizer.apply_chat_template(messages[: i + 1], tokenize=False))
        except TemplateError:  # some refuse roles, or turns out of order
            continue
        if not (opened.startswith(before) and closed.startswith(opened)):
            # Some templates tell earlier turns otherwise once there are later ones: only the last is sure.
            pieces, before = [], ""
            if not closed.startswith(opened):
                continue
        pieces += [(opened[len(before) :], False), (closed[len(opened) :], True)]
        before = closed
    input_ids: list[int] = []
    labels: list[int] = []
    for text, learnt in pieces:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        input_ids += ids
        labels += ids if learnt or form.train_on_inputs else [IGNORED] * len(ids)
    return {"input_ids": input_ids[: form.longest], "labels": labels[: form.longest]}


def _messages(row: Record) -> list[dict[str, str]]:
    found = next(row[name] for name in CHATS if name in row)
    out = []
    for message in found or []:
        role = message.get("role") or message.get("from")
        content = message.get("content") or message.get("value") or ""
        out.append({"role": ROLES.get(role, role), "content": content})
    return out


def fingerprint(source: str, tokenizer: PreTrainedTokenizerBase, form: Format) -> str:
    """Of everything that tokenized data depends on: the key of ``--cache_dataset``."""
    path = Path(source).expanduser()
    stamp = [path.stat().st_size, path.stat().st_mtime_ns] if path.is_file() else []
    template = Path(form.template or "")
    told = template.read_text(encoding="utf-8") if template.suffix == ".json" and template.is_file() else ""
    known = [source, stamp, told, asdict(form), sorted(tokenizer.get_vocab().items()), tokenizer.chat_template]
    return digest(known)
