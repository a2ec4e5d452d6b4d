"""The file of a recipe: found by its name, YAML, with the line of every entry for error messages."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..errors import PrunerError

LIBRARY = Path(__file__).with_name("library")  # recipes that come with the package
MOST_ENTRIES = 100_000  # of a recipe, anchors spelt out
Location = tuple[Any, ...]  # keys and indices from the top of a document to an entry


@dataclass(frozen=True)
class Source:
    """A file, and the line of every entry by its location."""

    path: str = ""
    lines: Mapping[Location, int] = field(default_factory=dict, repr=False)

    def fault(self, location: Location, message: str) -> PrunerError:
        """Return an error with the file and the line of an entry, or of the nearest entry around it."""
        return PrunerError(f"{self.path}:{self.line(location)}: {message}")

    def line(self, location: Location) -> int:
        while location and location not in self.lines:
            location = location[:-1]
        return self.lines.get(location, 1)


class Loader(yaml.SafeLoader):
    """YAML 1.2's numbers: 1e-4 is one, as it is for people, while YAML 1.1 reads it as a string."""


Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:float"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.[\d_]*([eE][-+]?\d+)?|\.\d[\d_]*([eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+)$"),
    list("-+0123456789."),
)


def find_recipe(name: str | Path) -> Path:
    """Return the file of a recipe: a file of the user's, or a recipe of the library by its name.

    A name of the library may carry the folder ``recipes/`` in front and the suffix of its file.

    Raises:
        PrunerError: there is neither; the message lists the library.

    >>> find_recipe("recipes/smollm2_demo.yaml") == find_recipe("smollm2_demo")
    True
    """
    path = Path(name).expanduser()
    if path.exists() and not path.is_dir():
        return path
    library = {file.relative_to(LIBRARY).with_suffix("").as_posix(): file for file in LIBRARY.rglob("*.yaml")}
    key = path.as_posix().removeprefix("recipes/").removesuffix(".yaml")
    if key not in library:
        raise PrunerError(
            f"there is no recipe file {name}, and no recipe of this name comes with llm-pruner: choose from "
            f"{', '.join(sorted(library))}"
        )
    return library[key]


def parse(path: str | Path) -> tuple[Any, Source]:
    """Parse a YAML file.

    Raises:
        PrunerError: the file cannot be read, is empty or not YAML, or gives a key twice; with the line.
    """
    try:
        content = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PrunerError(f"cannot read the recipe {path}: {error}") from error
    try:
        node = yaml.compose(content, Loader)
        if node is None:
            raise PrunerError(f"the recipe {path} is empty")
        lines = list(itertools.islice(_lines(node, ()), MOST_ENTRIES))
        if len(lines) == MOST_ENTRIES:  # a few anchors that name each other stand for billions
            raise PrunerError(f"{path}: more than {MOST_ENTRIES:,} entries: write fewer, or refer to fewer anchors")
        return Loader(content).construct_document(node), Source(str(path), dict(lines))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise PrunerError(f"{path}{line}: {getattr(error, 'problem', None) or error}") from error
    except RecursionError as error:
        raise PrunerError(f"{path}: entries are nested too deep, or an anchor refers to itself") from error


def _lines(node: yaml.Node, location: Location) -> Iterator[tuple[Location, int]]:
    yield location, node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        seen: set[Any] = set()
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key must be a word", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
            yield from _lines(value, (*location, key.value))
            yield (*location, key.value), key.start_mark.line + 1
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            yield from _lines(value, (*location, i))
