"""How an instruction becomes a prompt: templates by name or from a file, and no template at all."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from ..errors import PrunerError

Prompt = Callable[[str, str], str]  # instruction and input (which may be empty) -> prompt
# Stanford Alpaca's wording, which models tuned on its data know.
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
# How lm-eval's harness asks most of its questions.
QUESTION = {
    "prompt_input": "Question: {instruction}\n{input}\nAnswer: ",
    "prompt_no_input": "Question: {instruction}\nAnswer: ",
}
TEMPLATES = {"alpaca": ALPACA, "question": QUESTION}


def prompt(name: str) -> Prompt:
    """The prompt of a template: a name from :data:`TEMPLATES`, or a JSON file with the keys of :data:`ALPACA`.

    Raises:
        PrunerError: there is no such template, or it lacks a key or a place for the instruction.
    """
    template = TEMPLATES.get(name)
    if template is None:
        path = Path(name).expanduser()
        if path.suffix != ".json" or not path.is_file():
            raise PrunerError(f"there is no prompt template {name!r}: choose {', '.join(TEMPLATES)}, or a .json file")
        try:
            template = json.loads(path.read_text(encoding="utf-8"))
            with_input, without = template["prompt_input"], template["prompt_no_input"]
            for text, needed in ((with_input, ("{instruction}", "{input}")), (without, ("{instruction}",))):
                if not all(place in text for place in needed):
                    raise KeyError(needed[-1])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise PrunerError(
                f"{name} is no prompt template: it must be JSON with prompt_input, holding {{instruction}} and "
                f"{{input}}, and prompt_no_input ({error})"
            ) from error
    with_input, without = template["prompt_input"], template["prompt_no_input"]

    def fill(instruction: str, context: str) -> str:
        known = {"instruction": instruction, "input": context}
        return re.sub(r"\{(instruction|input)\}", lambda found: known[found[1]], with_input if context else without)

    return fill


def plain(instruction: str, context: str) -> str:
    """No template: the instruction, ended by a colon unless it ends in ``:``, ``?`` or ``!``, then the input.

    A space and the answer follow.
    """
    instruction = instruction.removesuffix(".")
    if not instruction.endswith((":", "?", "!")):
        instruction += ":"
    if context and not context.endswith((".", ":", "?", "!")):
        context += "."
    return f"{instruction} {context}"
