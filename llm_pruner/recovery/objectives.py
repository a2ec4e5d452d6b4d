"""Denoising objectives for encoder-decoders on plain text: the mixture of denoisers of UL2 (arXiv 2205.05131).

A denoiser takes spans out of a window of text. The encoder reads the remaining text, with a sentinel
(``<extra_id_0>``, ...) in place of each span; the decoder writes each sentinel and its span. Table 1 of the paper gives
the mean length of a span and the share of the tokens taken out:

    R  regular     (3, 15%) (8, 15%)
    S  sequential  the last 25%
    X  extreme     (3, 50%) (8, 50%) (64, 15%) (64, 50%)

``ul2`` draws each of the seven settings equally often: R, S and X 2, 1 and 4 times of 7. X's long targets then dominate
the loss: of 100 target tokens 14 are R's and 75 X's. Two variants are for recovery. They are named after OpenBA-V2's
(arXiv 2405.05957), whose paper leaves details open:

``d_ul2``  R, S and X are drawn so that each gives the same number of target tokens.
``o_ul2``  short pieces of text, each with its own denoiser, are packed into one window of the encoder and one of the
           decoder, with hardly any padding. Sentinels are numbered through a window.
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
Spans = list[tuple[int, int]]  # begin and end of each
Piece = tuple[str, list[int], Spans]  # family of its denoiser, token ids, spans taken out
PIECES_PER_WINDOW = 4  # of o_ul2
POOL_SIZE = 64  # pieces that o_ul2 packs from


@dataclass(frozen=True)
class Denoiser:
    """One setting of a denoiser.

    Attributes:
        family: R, S or X.
        span: mean length of the spans; 0 for one span at the end.
        rate: share of the tokens taken out.
    """

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
# Mode tokens, put before the input where the tokenizer has them: UL2's own and plain ones.
MODES = {"R": ("[NLU]", "[R]", "<R>"), "S": ("[S2S]", "[S]", "<S>"), "X": ("[NLG]", "[X]", "<X>")}


@dataclass(frozen=True)
class Vocabulary:
    """Special tokens for denoising."""

    sentinels: tuple[int, ...]
    eos: tuple[int, ...]
    modes: dict[str, tuple[int, ...]]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
        """Find the special tokens of a tokenizer.

        Raises:
            PrunerError: the tokenizer has no sentinels.
        """
        ids = tokenizer.get_vocab()
        sentinels = {int(m[1]): i for token, i in ids.items() if (m := re.fullmatch(r"<extra_id_(\d+)>", token))}
        if not sentinels:
            raise PrunerError(
                "the tokenizer has no sentinel tokens <extra_id_0>, ..., which UL2 needs: give --objective causal"
            )
        modes = {family: tuple(ids[t] for t in tokens if t in ids)[:1] for family, tokens in MODES.items()}
        eos = () if tokenizer.eos_token_id is None else (cast(int, tokenizer.eos_token_id),)
        return cls(tuple(sentinels[i] for i in sorted(sentinels)), eos, modes)


def mixing_rates(objective: str) -> dict[Denoiser, float]:
    """Return the probability of each denoiser."""
    if objective != "d_ul2":
        return {denoiser: 1 / len(UL2) for denoiser in UL2}
    rates: dict[Denoiser, float] = {}
    for family in MODES:
        members = [denoiser for denoiser in UL2 if denoiser.family == family]
        mean = sum(denoiser.rate for denoiser in members) / len(members)
        rates |= {denoiser: 1 / mean / len(members) for denoiser in members}
    total = sum(rates.values())
    return {denoiser: rate / total for denoiser, rate in rates.items()}


def draw_spans(length: int, denoiser: Denoiser, rng: random.Random) -> Spans:
    """Draw spans of ``length * rate`` tokens in all; none at the beginning, no two adjacent."""
    noise = min(max(round(length * denoiser.rate), 1), length - 1)
    if not denoiser.span:
        return [(length - noise, length)]
    count = min(max(round(noise / denoiser.span), 1), noise, length - noise)
    sizes, distances = _partition(noise, count, rng), _partition(length - noise, count, rng)
    spans, position = [], 0
    for distance, size in zip(distances, sizes, strict=True):
        spans.append((position + distance, position + distance + size))
        position += distance + size
    return spans


def _partition(total: int, count: int, rng: random.Random) -> list[int]:
    """Draw ``count`` positive numbers whose sum is ``total``, uniformly."""
    cuts = [0, *sorted(rng.sample(range(1, total), count - 1)), total]
    return [b - a for a, b in pairwise(cuts)]


def corrupt(ids: list[int], spans: Spans, sentinels: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """Return the encoder's input and the decoder's target, with a sentinel for each span.

    >>> corrupt([10, 11, 12, 13, 14], [(1, 3)], (1000,))
    ([10, 1000, 13, 14], [1000, 11, 12])
    """
    source, target, position = [], [], 0
    for (start, end), sentinel in zip(spans, sentinels, strict=False):
        source += [*ids[position:start], sentinel]
        target += [sentinel, *ids[start:end]]
        position = end
    return source + ids[position:], target


def denoise(windows: Iterable[list[int]], objective: str, vocabulary: Vocabulary, seed: int = 0) -> Iterator[Example]:
    """Yield ``input_ids`` of the encoder and ``labels`` of the decoder from windows of token ids."""
    rng = random.Random(seed)
    rates = mixing_rates(objective)

    def draw_piece(ids: list[int]) -> Piece:
        (denoiser,) = rng.choices(list(rates), list(rates.values()))
        return denoiser.family, ids, draw_spans(len(ids), denoiser, rng)[: len(vocabulary.sentinels)]

    if objective != "o_ul2":
        for window in windows:
            yield _make_example([draw_piece(window)], vocabulary)
        return
    pool: list[Piece] = []
    room = 0
    for window in windows:
        room = len(window)
        size = max(2, room // PIECES_PER_WINDOW)
        pool += [draw_piece(window[i : i + size]) for i in range(0, room - size + 1, size)]
        while len(pool) >= POOL_SIZE:
            yield _make_example(_take_window(pool, room, vocabulary), vocabulary)
    while pool:
        yield _make_example(_take_window(pool, room, vocabulary), vocabulary)


def _sizes(piece: Piece) -> tuple[int, int]:
    """Return the tokens of a piece that the encoder and the decoder get."""
    _, ids, spans = piece
    removed = sum(end - start for start, end in spans)
    return 1 + len(ids) - removed + len(spans), removed + len(spans)


def _take_window(pool: list[Piece], room: int, vocabulary: Vocabulary) -> list[Piece]:
    """Take pieces from the pool that fill an encoder's window of ``room`` tokens and a decoder's of half as many."""
    pieces = [pool.pop(0)]
    source, target = _sizes(pieces[0])
    spans = len(pieces[0][2])
    while True:
        fits = []
        for i, piece in enumerate(pool):
            s, t = _sizes(piece)
            if source + s < room and target + t < room // 2 and spans + len(piece[2]) <= len(vocabulary.sentinels):
                # Prefer the piece that keeps both windows equally full.
                fits.append((abs((source + s) / room - (target + t) / (room // 2)), i))
        if not fits:
            return pieces
        piece = pool.pop(min(fits)[1])
        pieces.append(piece)
        source, target, spans = source + _sizes(piece)[0], target + _sizes(piece)[1], spans + len(piece[2])


def _make_example(pieces: list[Piece], vocabulary: Vocabulary) -> Example:
    source: list[int] = []
    target: list[int] = []
    used = 0
    for family, ids, spans in pieces:
        encoder_ids, decoder_ids = corrupt(ids, spans, vocabulary.sentinels[used:])
        source += [*vocabulary.modes[family], *encoder_ids]
        target += decoder_ids
        used += len(spans)
    return {"input_ids": [*source, *vocabulary.eos], "labels": [*target, *vocabulary.eos]}
