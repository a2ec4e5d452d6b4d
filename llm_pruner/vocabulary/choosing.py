"""Which tokens stay."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..errors import PrunerError
from ..surgery.tokenizer import Subwords

ROUNDS = 40
# Scripts that a language is written in, by the words that begin Unicode's names of their letters.
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


def choose(
    words: Subwords,
    counts: np.ndarray,
    keep: str = "1.0",
    min_count: int = 0,
    protected: Iterable[int] = (),
    wanted: set[int] | None = None,
    whole: np.ndarray | None = None,
) -> list[int]:
    """The ids that stay, sorted: what must, then what the text has most of for each row that it takes.

    A token can stay with all that it is merged from, which brings every time that it or one of these occurs, or, if
    ``whole`` is given and the tokenizer allows it, alone, which brings the times that it is a whole word.

    Args:
        counts: occurrences by id.
        keep: how many: a number of tokens, a share of them (``0.5``), or ``coverage=0.9999``, the fewest that make up
            that share of all that was counted.
        min_count: only tokens that occur at least so often.
        protected: ids that stay as well.
        wanted: only tokens among these, if given.
        whole: occurrences by id as a whole word.

    Raises:
        PrunerError: ``keep`` is no such thing, or fewer than must stay.
    """
    chosen: set[int] = set()
    for i in [*words.required, *protected]:
        chosen |= words.needs(i, chosen) or {i}
    limit, share = token_budget(keep, len(words.tokens))
    if limit is not None and limit < len(chosen):
        raise PrunerError(
            f"--keep {keep} is {limit} tokens, and {len(chosen)} have to stay: special and added tokens, and the "
            "characters or bytes that any text can be written with"
        )
    often = {i: int(counts[i]) if i < len(counts) else 0 for i in words.tokens}
    alone = {i: int(whole[i]) if words.by_words and whole is not None and i < len(whole) else 0 for i in words.tokens}
    reached = set(chosen)  # by merges, and not only as whole words

    def brings(i: int) -> int:
        """What the text has of a token that gets reached."""
        return often[i] - alone[i] if i in chosen else often[i]

    total = sum(often.values()) or 1
    covered = sum(often[i] for i in chosen)
    most = len(words.tokens) if limit is None else limit
    open_ = {i for i in words.tokens if often[i] >= min_count and (wanted is None or i in wanted)} - chosen
    step = max(1, most // ROUNDS)
    while open_ and len(chosen) < most:
        # What a token brings, for each row that it takes: that changes with what is there already, so only the first
        # few are taken before all are looked at again.
        values: list[tuple[float, int, bool]] = []
        for i in list(open_):
            needed = words.needs(i, reached)
            rows = len(needed - chosen) if needed else 0
            if needed and not rows:
                covered += sum(map(brings, needed))
                reached |= needed
            if not needed or not rows:
                open_.discard(i)
                continue
            if len(chosen) + rows <= most:
                values.append((-sum(map(brings, needed)) / rows, i, False))
            if alone[i] and i not in chosen:
                values.append((-alone[i], i, True))
        if not values:
            break
        goal = min(len(chosen) + step, most)
        for _, i, word in sorted(values):
            if share is not None and covered >= share * total:
                return sorted(chosen)
            if word:
                covered += 0 if i in chosen else alone[i]
                chosen.add(i)
            else:
                needed = words.needs(i, reached) or set()
                if len(chosen | needed) > most:
                    continue
                covered += sum(map(brings, needed))
                chosen |= needed
                reached |= needed
            if len(chosen) >= goal:
                break
    return sorted(chosen)


def token_budget(keep: str, size: int) -> tuple[int | None, float | None]:
    """How many tokens, or what share of what was counted."""
    name, _, value = keep.partition("=")
    try:
        if name == "coverage" and 0 < float(value) <= 1:
            return None, float(value)
        if not value and float(keep) > 0:
            number = float(keep)
            if number > 1 and number == int(number):
                return min(int(number), size), None
            if number <= 1:
                return int(number * size), None
    except (ValueError, OverflowError):
        pass
    raise PrunerError(f"--keep {keep!r} is no number of tokens: give 15000, 0.5 (a share) or coverage=0.9999")


def in_scripts(words: Subwords, tokenizer: PreTrainedTokenizerBase, scripts: Iterable[str]) -> set[int]:
    """The tokens all of whose letters are of these scripts; pieces of characters, which have none, are left out.

    Raises:
        PrunerError: an unknown script.
    """
    known = {name.lower(): name for name in SCRIPTS}
    chosen: list[str] = []
    for script in scripts:
        if script.lower() not in known:
            raise PrunerError(f"unknown script {script!r}; choose from {', '.join(SCRIPTS)}")
        chosen += SCRIPTS[known[script.lower()]]
    prefixes = tuple(chosen)
    out = set()
    for i in words.tokens:
        text = tokenizer.decode([i])
        letters = [c for c in str(text) if c.isalpha()]
        if "\ufffd" not in text and all(unicodedata.name(c, "").startswith(prefixes) for c in letters):
            out.add(i)
    return out


def scripts_of(languages: Iterable[str]) -> list[str]:
    """The scripts of languages by their two letters.

    Raises:
        PrunerError: a language that is not known.
    """
    out: list[str] = []
    for language in languages:
        if language not in LANGUAGES:
            raise PrunerError(f"unknown language {language!r}; choose from {', '.join(sorted(LANGUAGES))} or --scripts")
        out += LANGUAGES[language]
    return list(dict.fromkeys(out))


def of_tokenizer(words: Subwords, other: Subwords) -> set[int]:
    """The ids of another tokenizer's tokens.

    Raises:
        PrunerError: it has tokens that this one has not.
    """
    missing = [token for token in other.tokens.values() if token not in words.ids]
    if missing:
        shown = ", ".join(map(repr, missing[:5]))
        raise PrunerError(
            f"the other tokenizer is no part of this one: {len(missing)} of its {len(other.tokens)} tokens are missing "
            f"here, the first {shown}"
        )
    return {words.ids[token] for token in other.tokens.values()}
