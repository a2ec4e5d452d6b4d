"""Read from a router how many experts must stay, and how many of each group.

A router takes the largest k of its scores. A group-limited router (DeepSeek-V3, arXiv 2412.19437, section 2.1.2) looks
at its experts as ``groups x experts per group``, takes the best groups, and then the largest k among their experts.
These two factors are no axes to prune: all groups must stay of one size, but which experts of each group stay is free.
So they become one axis of all experts again, of which as many must stay in every group.
"""

from __future__ import annotations

import re

import torch

from .axes import Atom
from .kinds import Occurrence

TOP_K = re.compile(r"top-k (\d+) of (\d+)")
GROUPS = "groups "


def top_k_tag(k: int, size: int) -> str:
    """Return the tag of an axis of which the largest ``k`` of ``size`` entries are taken.

    >>> top_k_tag(2, 8)
    'top-k 2 of 8'
    """
    return f"top-k {k} of {size}"


def fewest(atom: Atom) -> int:
    """Return how many indices an axis must keep: as many as are taken of it."""
    return max([1, *(int(match[1]) for tag in atom.tags if (match := TOP_K.fullmatch(tag)))])


def groups_of(atom: Atom) -> int:
    """Return in how many equal groups of consecutive indices as many must stay; 1 for no groups."""
    return max([1, *(int(tag.removeprefix(GROUPS)) for tag in atom.tags if tag.startswith(GROUPS))])


def join_groups(found: list[Occurrence]) -> list[Occurrence]:
    """Return the leaves with the two factors of group-limited experts as one."""
    factors: dict[tuple[tuple[str, int], ...], list[Occurrence]] = {}
    for atom, where in found:
        if "indexed" in atom.tags:
            factors.setdefault(tuple(sorted(where)), []).append((atom, where))
    leaves = {id(atom): (atom, where) for atom, where in found}
    for pair in factors.values():
        joined = _joined(*pair) if len(pair) == 2 else None
        if joined is not None:
            leaves[id(pair[0][0])] = joined
            del leaves[id(pair[1][0])]
    return list(leaves.values())


def _joined(one: Occurrence, other: Occurrence) -> Occurrence | None:
    """Return the product of two leaves whose indices are the positions of every dim that they run through, or None."""
    (outer, labels), (inner, inner_labels) = one, other
    if any(bool((label.diff() < 0).any()) for label in labels.values()):
        (outer, labels), (inner, inner_labels) = other, one
    size = outer.size * inner.size
    where = {}
    for key, label in labels.items():
        where[key] = label * inner.size + inner_labels[key]
        if not torch.equal(where[key], torch.arange(size)):
            return None
    atom = Atom(size, outer.frozen or inner.frozen)
    atom.flags = outer.flags | inner.flags
    groups = _largest(outer, outer.size) or outer.size
    in_group = max(_largest(inner, inner.size), -(-_largest(outer, size) // groups), 1)
    atom.tags = {tag for tag in outer.tags | inner.tags if not TOP_K.fullmatch(tag)}
    atom.tags |= {top_k_tag(in_group * outer.size, size), f"{GROUPS}{outer.size}"}
    return atom, where


def _largest(atom: Atom, size: int) -> int:
    """Return the largest k that is taken of an axis of ``size``, 0 if none is."""
    matches = [match for tag in atom.tags if (match := TOP_K.fullmatch(tag)) and int(match[2]) == size]
    return max((int(match[1]) for match in matches), default=0)
