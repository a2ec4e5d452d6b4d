"""Documents and files that are harmed at random, and the outcomes that are allowed: a line for the user, or success."""

from __future__ import annotations

import copy
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

import llm_pruner as lp

EXAMPLES = int(os.environ.get("FUZZ", 60))
SOME = settings(
    deadline=None,
    max_examples=EXAMPLES,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much],
)
FEW = settings(SOME, max_examples=-(-EXAMPLES // 6))  # of examples that take a second
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.sampled_from([-1, 0, 2**31, 2**63, 1e400, -0.5, 0.5]),
    st.text(max_size=8),
    st.sampled_from(["", "../up", "/etc/passwd", "nan", "model.safetensors", "taylor", "a" * 300, "\x00", "\ud7ff"]),
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)),
    max_leaves=6,
)


def places(node, path=()):
    """Every place of a document."""
    yield path
    for key, inner in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield from places(inner, (*path, key))


@st.composite
def harmed(draw, document, most=3):
    """A document with some places replaced, removed or doubled."""
    out = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, most))):
        path = draw(st.sampled_from(list(places(out))))
        if not path:
            continue
        node = out
        for key in path[:-1]:
            node = node[key]
        match draw(st.sampled_from(["replace", "remove", "add"])):
            case "replace":
                node[path[-1]] = draw(JSON)
            case "remove":
                del node[path[-1]]
            case "add" if isinstance(node, list):
                node.append(draw(JSON))
            case "add":
                node[draw(st.text(max_size=6))] = draw(JSON)
    return out


def refused_or_done(action):
    """Check the message for bad input."""
    try:
        action()
    except lp.PrunerError as error:
        assert str(error).strip()


def linked(source: Path, target: Path, *left_out: str) -> Path:
    """Make a folder of links to the files of another."""
    target.mkdir(exist_ok=True)
    for file in source.iterdir():
        if file.name not in left_out:
            (target / file.name).symlink_to(file)
    return target


def sizes_of(document) -> list[float]:
    """List the numbers of a document that may be sizes beyond memory."""
    return [v for v in _leaves(document) if isinstance(v, (int, float)) and abs(v) > 2000]


def _leaves(node):
    if isinstance(node, (dict, list)):
        for inner in node.values() if isinstance(node, dict) else node:
            yield from _leaves(inner)
    else:
        yield node


@st.composite
def harmed_bytes(draw, content: bytes, within: int | None = None):
    """Return bytes with some of the first ones replaced, removed or doubled, or the end cut off."""
    out = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        if not out:
            break
        at = draw(st.integers(0, min(len(out), within or len(out)) - 1))
        match draw(st.sampled_from(["replace", "remove", "double", "number", "cut"])):
            case "replace":
                out[at] = draw(st.integers(0, 255))
            case "remove":
                del out[at : at + draw(st.integers(1, 9))]
            case "double":
                out[at:at] = out[at : at + draw(st.integers(1, 9))]
            case "number":
                out[at : at + 8] = draw(st.sampled_from([0, 1, 2**31, 2**32, 2**62, 2**64 - 1])).to_bytes(8, "little")
            case "cut":
                del out[at + 1 :]
    return bytes(out)


def split_header(file: Path) -> tuple[dict, bytes]:
    """Return the header of a safetensors file and the bytes behind."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join_header(header, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@contextmanager
def scratch(factory, name: str):
    """Make a folder for one example, and remove it."""
    place = factory.mktemp(name)
    yield place
    shutil.rmtree(place)
