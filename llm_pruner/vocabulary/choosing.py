"""Choose the tokens to keep."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..errors import PrunerError
from ..flags import read_share
from ..surgery.tokenizer import Subwords

ROUNDS = 40  # in which tokens are chosen: each fills about 1/40 of the budget, then all are ranked anew
# Scripts by the words that begin the Unicode names of their letters.
SCRIPTS = {
    "Latin": ("LATIN",),
    "Han": ("CJK", "KANGXI"),
    "Kana": ("HIRAGANA", "KATAKANA"),
    "Hangul": ("HANGUL",),
    "Cyrillic": ("CYRILLIC",),
    "Greek": ("GREEK",),
    "Arabic": ("ARABIC",),
    "Hebrew": ("HEBREW",),
    "Devanagari": ("DEVANAGARI",),
    "Bengali": ("BENGALI",),
    "Tamil": ("TAMIL",),
    "Telugu": ("TELUGU",),
    "Thai": ("THAI",),
    "Georgian": ("GEORGIAN",),
    "Armenian": ("ARMENIAN",),
    "Ethiopic": ("ETHIOPIC",),
}
LATIN = (
    *("en", "fr", "de", "es", "it", "pt", "nl", "sv", "da", "no", "fi", "pl", "cs", "ro", "hu", "tr", "vi", "id", "ms"),
    *("sw", "ca", "eu"),
)
LANGUAGES = {
    **dict.fromkeys(LATIN, ("Latin",)),
    **dict.fromkeys(("ru", "uk", "bg", "be", "mk", "kk"), ("Cyrillic",)),
    **dict.fromkeys(("ar", "fa", "ur"), ("Arabic",)),
    **dict.fromkeys(("hi", "mr", "ne"), ("Devanagari",)),
    "zh": ("Han",),
    "ja": ("Han", "Kana"),
    "ko": ("Hangul", "Han"),
    "el": ("Greek",),
    "he": ("Hebrew",),
    "bn": ("Bengali",),
    "ta": ("Tamil",),
    "te": ("Telugu",),
    "th": ("Thai",),
    "ka": ("Georgian",),
    "hy": ("Armenian",),
    "am": ("Ethiopic",),
    "sr": ("Cyrillic", "Latin"),
}


class Coverage:
    """Kept tokens, and how much of the counted text they cover.

    A token is kept in one of two ways. *Merged*: with all tokens that it is merged from, so that it covers every
    occurrence. *As a word*: alone, so that it covers only its occurrences as a whole word.

    Attributes:
        occurrences: of every token in the text.
        word_occurrences: of every token as a whole word; all 0 where tokens cannot be kept as words.
        kept: tokens that have a row.
        merged: kept tokens that are reached by merges.
        covered: occurrences that the kept tokens cover.
        total: occurrences of all tokens.
    """

    def __init__(self, words: Subwords, counts: np.ndarray, word_counts: np.ndarray | None = None):
        no_words = np.zeros(0, dtype=np.int64)
        self.words = words
        self.occurrences = _by_token(words, counts)
        self.word_occurrences = _by_token(words, no_words if word_counts is None or not words.by_words else word_counts)
        self.kept: set[int] = set()
        self.merged: set[int] = set()
        self.covered, self.total = 0, sum(self.occurrences.values()) or 1

    def gain(self, tokens: Iterable[int]) -> int:
        """Count the occurrences that are covered once tokens are reached by merges, and are not covered now."""
        return sum(self.occurrences[i] - (self.word_occurrences[i] if i in self.kept else 0) for i in tokens)

    def keep_merged(self, tokens: set[int]) -> None:
        """Keep tokens that reach each other by merges."""
        self.covered += self.gain(tokens)
        self.kept |= tokens
        self.merged |= tokens

    def keep_word(self, token: int) -> None:
        """Keep a token as a whole word."""
        self.covered += 0 if token in self.kept else self.word_occurrences[token]
        self.kept.add(token)

    def reaches(self, share: float | None) -> bool:
        """Return True if the kept tokens cover this share of the text; None is never reached."""
        return share is not None and self.covered >= share * self.total


class _Candidate(NamedTuple):
    """A way to keep one more token; the best sorts first."""

    negative_value: float  # occurrences that it covers per row that it takes
    unwritten: bool  # it has no occurrence, and no text can have one
    token: int
    as_word: bool


def choose(
    words: Subwords,
    counts: np.ndarray,
    keep: str = "1.0",
    *,
    min_count: int = 0,
    protected: Iterable[int] = (),
    given_up: Iterable[int] = (),
    among: set[int] | None = None,
    whole: np.ndarray | None = None,
) -> list[int]:
    """Choose the ids to keep, sorted: what the tokenizer needs, then tokens by the text that they cover per row.

    Args:
        counts: int64 ``[tokens]``, occurrences by id.
        keep: a number of tokens (``15000``), a share of them (``0.5``), or ``coverage=0.9999``, the fewest tokens that
            cover this share of the counted text.
        min_count: keep only tokens that occur at least this often.
        protected: ids to keep in any case.
        given_up: ids that the tokenizer needs for some texts, and that need not stay.
        among: keep only tokens among these; None: among all.
        whole: int64 ``[tokens]``, occurrences by id as a whole word. If given, and the tokenizer allows it, a token may
            be kept as a whole word, without the tokens that it is merged from.

    Raises:
        PrunerError: ``keep`` is not valid, or below the number of tokens that have to stay.
    """
    limit, share = token_budget(keep, len(words.tokens))
    coverage = Coverage(words, counts, whole)
    for i in [*(words.required - {*given_up}), *protected]:
        if i not in coverage.kept:
            coverage.keep_merged(words.needs(i, coverage.kept) or {i})
    if limit is not None and limit < len(coverage.kept):
        raise PrunerError(
            f"--keep {keep} is {limit} tokens, but {len(coverage.kept)} have to stay: special and added tokens, and "
            "the characters or bytes that any text can be written with; give more"
        )
    most = len(words.tokens) if limit is None else limit
    often = {i for i, count in coverage.occurrences.items() if count >= min_count}
    remaining = (often if among is None else often & among) - coverage.kept
    step = max(1, most // ROUNDS)
    while remaining and len(coverage.kept) < most:
        # The value of a token changes with the tokens kept before it, so only the best few are kept per round.
        candidates = _rank(coverage, remaining, most)
        if not candidates:
            break
        _keep_best(coverage, candidates, goal=min(len(coverage.kept) + step, most), most=most, share=share)
        if coverage.reaches(share):
            break
    return sorted(coverage.kept)


def _by_token(words: Subwords, counts: np.ndarray) -> dict[int, int]:
    return {i: int(counts[i]) if i < len(counts) else 0 for i in words.tokens}


def _rank(coverage: Coverage, remaining: set[int], most: int) -> list[_Candidate]:
    """Return the ways to keep remaining tokens, best first; tokens that take no row or cannot be kept are removed."""
    candidates = []
    for i in sorted(remaining):
        needed = coverage.words.needs(i, coverage.merged) or set()
        rows = len(needed - coverage.kept)
        if not rows:
            coverage.keep_merged(needed)
            remaining.discard(i)
            continue
        if len(coverage.kept) + rows <= most:
            unwritten = not coverage.occurrences[i] and not coverage.words.stays_whole(i)
            candidates.append(_Candidate(-coverage.gain(needed) / rows, unwritten, i, False))
        if coverage.word_occurrences[i] and i not in coverage.kept:
            candidates.append(_Candidate(-coverage.word_occurrences[i], False, i, True))
    return sorted(candidates)


def _keep_best(coverage: Coverage, candidates: list[_Candidate], *, goal: int, most: int, share: float | None) -> None:
    """Keep candidates until ``goal`` tokens are kept or the share is covered."""
    for candidate in candidates:
        if len(coverage.kept) >= goal or coverage.reaches(share):
            return
        if candidate.as_word:
            coverage.keep_word(candidate.token)
            continue
        needed = coverage.words.needs(candidate.token, coverage.merged) or set()
        if len(coverage.kept | needed) <= most:
            coverage.keep_merged(needed)


def token_budget(keep: str, size: int) -> tuple[int | None, float | None]:
    """Return the number of tokens that ``--keep`` allows, or the share of the counted text to cover.

    >>> token_budget("50%", 800), token_budget("coverage=0.999", 800)
    ((400, None), (None, 0.999))

    Raises:
        PrunerError: ``keep`` is not valid, or above ``size``.
    """
    name, _, value = keep.rpartition("=")
    try:
        number = read_share(value) if value.endswith("%") else float(value)
    except ValueError:
        number = 0.0
    if name == "coverage" and 0 < number <= 1:
        return None, number
    if not name and 0 < number <= 1:
        return int(number * size), None
    if not name and number.is_integer() and number > 1 and not value.endswith("%"):
        if number > size:
            raise PrunerError(f"--keep {keep} is above the {size} tokens of the model: give fewer")
        return int(number), None
    raise PrunerError(f"--keep {keep!r} is not valid: give 15000 (tokens), 0.5 or 50% (a share) or coverage=0.9999")


def in_scripts(words: Subwords, tokenizer: PreTrainedTokenizerBase, scripts: Sequence[str]) -> set[int]:
    """Return the ids of tokens whose letters all belong to these scripts; parts of characters are left out.

    Raises:
        PrunerError: a script is unknown.
    """
    prefixes = tuple(prefix for name in check_scripts(scripts) for prefix in SCRIPTS[name])

    def fits(text: str) -> bool:
        letters = [c for c in text if c.isalpha()]
        return "\ufffd" not in text and all(unicodedata.name(c, "").startswith(prefixes) for c in letters)

    return {i for i in words.tokens if fits(str(tokenizer.decode([i])))}


def check_scripts(scripts: Sequence[str]) -> list[str]:
    """Return scripts as they are spelt in :data:`SCRIPTS`.

    Raises:
        PrunerError: a script is unknown.
    """
    names = {name.lower(): name for name in SCRIPTS}
    for script in scripts:
        if script.lower() not in names:
            raise PrunerError(f"--scripts {script!r} is unknown: choose from {', '.join(SCRIPTS)}")
    return [names[script.lower()] for script in scripts]


def scripts_of(languages: Iterable[str]) -> list[str]:
    """Return the scripts of languages, which are named by two letters.

    >>> scripts_of(["en", "ja"])
    ['Latin', 'Han', 'Kana']

    Raises:
        PrunerError: a language is unknown.
    """
    scripts: list[str] = []
    for language in languages:
        if language not in LANGUAGES:
            choices = ", ".join(sorted(LANGUAGES))
            raise PrunerError(f"--languages {language!r} is unknown: choose from {choices}, or give --scripts")
        scripts += LANGUAGES[language]
    return list(dict.fromkeys(scripts))


def ids_of_tokenizer(words: Subwords, other: Subwords) -> set[int]:
    """Return the ids that another tokenizer's tokens have in this one.

    Raises:
        PrunerError: the other tokenizer has tokens that this one lacks.
    """
    missing = [token for token in other.tokens.values() if token not in words.ids]
    if missing:
        shown = ", ".join(map(repr, missing[:5]))
        raise PrunerError(
            f"--to_tokenizer is not a subset of the model's tokenizer: {len(missing)} of its {len(other.tokens)} "
            f"tokens are missing there, the first {shown}"
        )
    return {words.ids[token] for token in other.tokens.values()}
