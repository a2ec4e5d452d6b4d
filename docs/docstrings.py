"""Docstrings of the code as Markdown, for the API reference: doctests are fenced, roles become names."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|data|func|mod):`~?([\w.]+)`")
DOCTEST = re.compile(r"^( *)(>>> .*(?:\n(?!\s*$).*)*)", re.MULTILINE)


class DocstringsAsMarkdown(griffe.Extension):
    """Rewrite the docstring of every object before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            text = ROLE.sub(lambda match: f"`{match[1].rpartition('.')[2]}`", obj.docstring.value)
            obj.docstring.value = DOCTEST.sub(r"\1```python\n\1\2\n\1```", text)
