"""What an encoder-decoder learns from plain text: to fill gaps, by the mixture of denoisers of UL2 (arXiv 2205.05131).

A denoiser takes spans out of a window of text; the encoder reads what is left, with a sentinel (``<extra_id_0>``, ...)
in place of each span, and the decoder writes sentinel and span in turn. By table 1 of the paper, with the mean length
of a span and the share of the tokens taken out,

    R  regular     (3, 15%) (8, 15%)
    S  sequential  all of the last 25%
    X  extreme     (3, 50%) (8, 50%) (64, 15%) (64, 50%)

``ul2`` takes R, S and X as often as they have settings: 2, 1 and 4 times of 7. Long answers then make most of the loss:
of 100 target tokens 14 are R's and 75 X's. Two variants are for recovery, under the names of OpenBA-V2 (arXiv
2405.05957), as they are understood here:

``d_ul2``  R, S and X are drawn so that each gives the same number of target tokens, and none is learnt at the cost of
           the others while a pruned model has little to learn from.
``o_ul2``  short pieces of text, each with a denoiser of its own, are packed into one window of the encoder and one of
           the decoder, so that hardly anything is padding. Sentinels are counted on through a window.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

from transformers import PreTrainedTokenizerBase

from ..errors import PrunerError

Example = dict[str, list[int]]
Gaps = list[tuple[int, int]]  # begin and end of each
Piece = tuple[str, list[int], Gaps]  # family of its denoiser, token ids, what it takes out
OBJECTIVES = ("causal", "ul2", "d_ul2", "o_ul2")
PIECES = 4  # pieces of text that o_ul2 makes of a window
POOL = 64  # pieces that it chooses from


@dataclass(frozen=True)
class Denoiser:
    """One setting: its family, the mean length of its spans (0: one span, at the end) and the share it takes out."""

    family: str
    span: int
    rate: float


UL2 = (
    Denoiser("R", 3, 0.15),
    Denoiser("R", 8, 0.15),
    Denoiser("S", 0, 0.25),
    Denoiser("X", 3, 0.5),
    Denoiser("X", 8, 0.5),
    Denoiser("X", 64, 0.15),
    Denoiser("X", 64, 0.5),
)
# Tokens that tell the model its mode, put before its input where the tokenizer knows one: UL2's own and plain ones.
MODES = {"R": ("[NLU]", "[R]", "<R>"), "S": ("[S2S]", "[S]", "<S>"), "X": ("[NLG]", "[X]", "<X>")}


@dataclass(frozen=True)
class Vocabulary:
    """The special tokens that denoising needs."""

    sentinels: tuple[int, ...]
    eos: tuple[int, ...]
    modes: dict[str, tuple[int, ...]]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
        """Raises: PrunerError: the tokenizer has no sentinels."""
        known = tokenizer.get_vocab()
        found = {int(m[1]): i for token, i in known.items() if (m := re.fullmatch(r"<extra_id_(\d+)>", token))}
        if not found:
            raise PrunerError("UL2 needs sentinel tokens <extra_id_0>, ..., and the tokenizer has none: use causal")
        modes = {family: tuple(known[t] for t in tokens if t in known)[:1] for family, tokens in MODES.items()}
        eos = () if tokenizer.eos_token_id is None else (cast(int, tokenizer.eos_token_id),)
        return cls(tuple(found[i] for i in sorted(found)), eos, modes)


def rates(objective: str) -> dict[Denoiser, float]:
    """How often each denoiser is drawn."""
    if objective != "d_ul2":
        return {denoiser: 1 / len(UL2) for denoiser in UL2}
    out: dict[Denoiser, float] = {}
    for family in MODES:
        members = [denoiser for denoiser in UL2 if denoiser.family == family]
        mean = sum(denoiser.rate for denoiser in members) / len(members)
        out |= {denoiser: 1 / mean / len(members) for denoiser in members}
    total = sum(out.values())
    return {denoiser: rate / total for denoiser, rate in out.items()}


def spans(length: int, denoiser: Denoiser, rng: random.Random) -> Gaps:
    """Where spans begin and end: as many tokens as the rate says, none at the beginning, no two in a row."""
    noise = min(max(round(length * denoiser.rate), 1), length - 1)
    if not denoiser.span:
        return [(length - noise, length)]
    count = min(max(round(noise / denoiser.span), 1), noise, length - noise)
    taken, left = _parts(noise, count, rng), _parts(length - noise, count, rng)
    out, position = [], 0
    for gap, size in zip(left, taken, strict=True):
        out.append((position + gap, position + gap + size))
        position += gap + size
    return out


def _parts(total: int, count: int, rng: random.Random) -> list[int]:
    """``total`` as a sum of ``count`` positive numbers, all such sums as likely."""
    cuts = [0, *sorted(rng.sample(range(1, total), count - 1)), total]
    return [b - a for a, b in pairwise(cuts)]


def corrupted(ids: list[int], gaps: Gaps, sentinels: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """``(input, target)``, with a sentinel for each gap."""
    source, target, position = [], [], 0
    for (start, end), sentinel in zip(gaps, sentinels, strict=False):
        source += [*ids[position:start], sentinel]
        target += [sentinel, *ids[start:end]]
        position = end
    return source + ids[position:], target


def denoised(windows: Iterable[list[int]], objective: str, vocabulary: Vocabulary, seed: int = 0) -> Iterator[Example]:
    """Windows of token ids as ``input_ids`` of the encoder and ``labels`` of the decoder."""
    rng = random.Random(seed)
    chances = rates(objective)

    def piece(ids: list[int]) -> Piece:
        (denoiser,) = rng.choices(list(chances), list(chances.values()))
        return denoiser.family, ids, spans(len(ids), denoiser, rng)[: len(vocabulary.sentinels)]

    if objective != "o_ul2":
        for window in windows:
            yield _example([piece(window)], vocabulary)
        return
    pool: list[Piece] = []
    room = 0
    for window in windows:
        room = len(window)
        size = max(2, room // PIECES)
        pool += [piece(window[i : i + size]) for i in range(0, room - size + 1, size)]
        while len(pool) >= POOL:
            yield _example(_packed(pool, room, vocabulary), vocabulary)
    while pool:
        yield _example(_packed(pool, room, vocabulary), vocabulary)


def _sizes(piece: Piece) -> tuple[int, int]:
    """Tokens of the encoder's and the decoder's part of a piece."""
    _, ids, gaps = piece
    taken = sum(end - start for start, end in gaps)
    return 1 + len(ids) - taken + len(gaps), taken + len(gaps)


def _packed(pool: list[Piece], room: int, vocabulary: Vocabulary) -> list[Piece]:
    """Take pieces from the pool that fill an encoder's window of ``room`` tokens and a decoder's of half as many."""
    out = [pool.pop(0)]
    source, target = _sizes(out[0])
    gaps = len(out[0][2])
    while True:
        fits = []
        for i, piece in enumerate(pool):
            s, t = _sizes(piece)
            if source + s < room and target + t < room // 2 and gaps + len(piece[2]) <= len(vocabulary.sentinels):
                # What keeps the two windows equally full.
                fits.append((abs((source + s) / room - (target + t) / (room // 2)), i))
        if not fits:
            return out
        piece = pool.pop(min(fits)[1])
        out.append(piece)
        source, target, gaps = source + _sizes(piece)[0], target + _sizes(piece)[1], gaps + len(piece[2])


def _example(pieces: list[Piece], vocabulary: Vocabulary) -> Example:
    source: list[int] = []
    target: list[int] = []
    used = 0
    for family, ids, gaps in pieces:
        read, written = corrupted(ids, gaps, vocabulary.sentinels[used:])
        source += [*vocabulary.modes[family], *read]
        target += written
        used += len(gaps)
    return {"input_ids": [*source, *vocabulary.eos], "labels": [*target, *vocabulary.eos]}
