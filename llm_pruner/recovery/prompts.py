"""Prompts of instructions: templates by name or from a file, and LLM-Pruner's form without a template."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import cast

from ..errors import PrunerError

Prompt = Callable[[str, str], str]  # instruction and input (which may be empty) -> prompt
# Stanford Alpaca's wording: models tuned on its data expect it.
ALPACA = {
    "prompt_input": (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
    ),
    "prompt_no_input": (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\n{instruction}\n\n### Response:\n"
    ),
}
# The wording of most tasks of lm-evaluation-harness.
QUESTION = {
    "prompt_input": "Question: {instruction}\n{input}\nAnswer: ",
    "prompt_no_input": "Question: {instruction}\nAnswer: ",
}
TEMPLATES = {"alpaca": ALPACA, "question": QUESTION}


def prompt_template(name: str | None) -> Prompt:
    """Return the function from instruction and input to a prompt.

    >>> prompt_template("question")("Why?", "")
    'Question: Why?\\nAnswer: '

    Args:
        name: from :data:`TEMPLATES`, or a JSON file with the keys of :data:`ALPACA`; None for :func:`plain_prompt`.

    Raises:
        PrunerError: the template does not exist, or lacks a key or a place for the instruction.
    """
    if name is None:
        return plain_prompt
    template = TEMPLATES[name] if name in TEMPLATES else _read_template(name)
    with_input, without = template["prompt_input"], template["prompt_no_input"]

    def fill(instruction: str, context: str) -> str:
        values = {"instruction": instruction, "input": context}
        return re.sub(r"\{(instruction|input)\}", lambda place: values[place[1]], with_input if context else without)

    return fill


def _read_template(name: str) -> dict[str, str]:
    path = Path(name).expanduser()
    if path.suffix != ".json" or not path.is_file():
        raise PrunerError(f"there is no prompt template {name!r}: choose {', '.join(TEMPLATES)}, or a .json file")
    try:
        template = json.loads(path.read_text(encoding="utf-8"))
        for key, places in (("prompt_input", ("{instruction}", "{input}")), ("prompt_no_input", ("{instruction}",))):
            for place in places:
                if not isinstance(template[key], str) or place not in template[key]:
                    raise ValueError(f"{key} has no {place}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise PrunerError(
            f"{name} is not a prompt template ({type(error).__name__}: {error}): give a JSON object whose prompt_input "
            "holds {instruction} and {input}, and whose prompt_no_input holds {instruction}"
        ) from error
    return cast(dict[str, str], template)


def plain_prompt(instruction: str, context: str) -> str:
    """Return a prompt without a template: the instruction and the input, each ended by punctuation.

    A space and the answer follow.

    >>> plain_prompt("Add these.", "1 and 2")
    'Add these: 1 and 2.'
    """
    instruction = instruction.removesuffix(".")
    if not instruction.endswith((":", "?", "!")):
        instruction += ":"
    if context and not context.endswith((".", ":", "?", "!")):
        context += "."
    return f"{instruction} {context}"
