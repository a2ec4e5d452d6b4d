"""Rows of data sets: recognise their kind by their columns, and check and read their values."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import date
from typing import Any, Literal

from .errors import PrunerError, in_one_line

Record = dict[str, Any]
RowKind = Literal["chat", "instruction", "pair", "text"]

TEXTS = ("text", "content", "sentence")
ANSWERS = ("output", "response", "completion", "answer", "chosen")
QUESTIONS = ("prompt", "question")
CHATS = ("messages", "conversations")
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
TURN = '{"role": "user", "content": "Hello"}'


def row_kind(columns: Iterable[str], source: str) -> RowKind:
    """Recognise the kind of a data set's rows by their columns.

    >>> row_kind(["instruction", "input", "output"], "alpaca.json")
    'instruction'

    Raises:
        PrunerError: no kind has these columns; the message lists them.
    """
    names = set(columns)
    kind = find_row_kind(names)
    if kind is None:
        raise PrunerError(
            f"{source} has the columns {', '.join(sorted(names)) or 'none'}: give instruction and output, prompt and "
            "completion, messages, or text"
        )
    return kind


def find_row_kind(columns: Iterable[str]) -> RowKind | None:
    """Return the kind of rows with these columns; None if no kind has them."""
    names = set(columns)
    if names & set(CHATS):
        return "chat"
    if "instruction" in names and names & set(ANSWERS):
        return "instruction"
    if names & set(QUESTIONS) and names & set(ANSWERS):
        return "pair"
    return "text" if names & set(TEXTS) else None


def read_conversation(row: Any) -> list[dict[str, str]]:
    r"""Return a row as the turns of a chat: its own, or a question and its answer; [] without an answer.

    >>> read_conversation({"instruction": "Add.", "input": "1 and 2", "output": "3"})
    [{'role': 'user', 'content': 'Add.\n\n1 and 2'}, {'role': 'assistant', 'content': '3'}]

    Raises:
        PrunerError: the row is malformed.
    """
    if not isinstance(row, dict):
        raise PrunerError(f"the row is {_describe(row)}: give an object")
    if set(row) & set(CHATS):
        return read_messages(row)
    answer = read_text(row, *ANSWERS)
    question = [read_text(row, *columns) for columns in (("instruction", *QUESTIONS), ("input",))]
    if not answer.strip():
        return []
    return [
        {"role": "user", "content": "\n\n".join(filter(None, question))},
        {"role": "assistant", "content": answer},
    ]


def read_text(row: Record, *columns: str) -> str:
    """Return the first of a row's columns that is not null, as text; ``""`` if all are null or missing.

    >>> read_text({"output": None, "response": 4}, "output", "response")
    '4'

    Raises:
        PrunerError: the value is neither a text nor a number.
    """
    for name in columns:
        value = row.get(name)
        if _is_text(value):
            return str(value)
        if value is not None:
            raise PrunerError(f"{name} is {_describe(value)}: give a text or a number")
    return ""


def read_messages(row: Record) -> list[dict[str, str]]:
    """Return the turns of a chat as ``{"role": ..., "content": ...}``; none if the chat is null.

    Roles of ShareGPT (``human``, ``gpt``) become those of chat templates, and content in parts becomes one text.

    Raises:
        PrunerError: the chat is no list, or a turn lacks its role or content or has one of another type.
    """
    for name in CHATS:
        turns = row.get(name)
        if isinstance(turns, list):
            return [_read_turn(turn, f"turn {number} of {name}") for number, turn in enumerate(turns, 1)]
        if turns is not None:
            raise PrunerError(f"{name} is {_describe(turns)}: give a list of turns, such as [{TURN}]")
    return []


def apply_template(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> Any:
    """Put turns into a tokenizer's chat template, a program of the checkpoint's that transformers runs in a sandbox.

    Raises:
        PrunerError: the template refuses the turns, or fails.
    """
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except Exception as error:  # a template may raise anything: 1/0, a name that is not there, a forbidden attribute
        raise PrunerError(f"the chat template refuses the conversation, or is damaged: {in_one_line(error)}") from error


def _read_turn(turn: Any, name: str) -> dict[str, str]:
    if not isinstance(turn, dict):
        raise PrunerError(f"{name} is {_describe(turn)}: give an object, such as {TURN}")
    role, content = (
        next((turn[key] for key in keys if turn.get(key) is not None), None)
        for keys in (("role", "from"), ("content", "value"))
    )
    if not isinstance(role, str) or not role:
        raise PrunerError(f"the role of {name} is {_describe(role)}: give a text, such as user or assistant")
    if isinstance(content, list):
        content = "".join(_read_part(part, f"part {number} of {name}") for number, part in enumerate(content, 1))
    if not _is_text(content):
        raise PrunerError(f"the content of {name} is {_describe(content)}: give a text, or a list of text parts")
    return {"role": ROLES.get(role, role), "content": str(content)}


def _read_part(part: Any, name: str) -> str:
    """Read a part of a turn's content as chat templates have it: ``{"type": "text", "text": "Hello"}``."""
    if isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise PrunerError(f'{name} is {_describe(part)}: give text parts, such as {{"type": "text", "text": "Hello"}}')


def _is_text(value: Any) -> bool:
    return isinstance(value, (str, int, float)) and not isinstance(value, bool)


def _describe(value: Any) -> str:
    """Name a value's type as JSON does and show its beginning: ``a list (['a', 'b'])``."""
    if value is None:
        return "missing"
    if value == "":
        return "empty"
    names = {dict: "an object", list: "a list", str: "a text", bool: "a boolean", int: "a number", float: "a number"}
    name = next((name for kind, name in names.items() if type(value) is kind), None)
    name = name or ("a date" if isinstance(value, date) else f"of type {type(value).__name__}")
    shown = repr(value)
    return f"{name} ({shown if len(shown) <= 60 else shown[:57] + '...'})"
