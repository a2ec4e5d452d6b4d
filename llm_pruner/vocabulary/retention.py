"""Decide which tokens stay: those that model and tokenizer need, and those that the settings ask for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoint.load import load_tokenizer, no_tokenizer
from ..errors import PrunerError
from ..row_kinds import apply_template
from ..surgery.config.token_ids import ids_in
from ..surgery.tokenizer import Subwords, keeps_words
from .choosing import choose, ids_of_tokenizer, in_scripts
from .counting import Counts, count


@dataclass(frozen=True, kw_only=True)
class Retention:
    """Settings: which tokens to keep.

    Attributes:
        keep: number, share or coverage; see :func:`~.choosing.choose`.
        min_count: keep only tokens that occur at least this often.
        to_tokenizer: name of a tokenizer whose tokens to keep only.
        scripts: keep only tokens in these scripts; empty: in any.
        unseen_characters: keep characters that the corpus lacks, so that no text has more unknown tokens than before.
        listed: file of tokens to keep in any case, one per line.
        corpus: names of the texts to count tokens in.
        max_documents: most documents to count of a data set on the hub; None: all.
        counts_file: file that keeps counts between runs.
        trust_remote_code: run code that comes with ``to_tokenizer``.
    """

    keep: str = "1.0"
    min_count: int = 0
    to_tokenizer: str | None = None
    scripts: tuple[str, ...] = ()
    unseen_characters: bool = True
    listed: Path | None = None
    corpus: tuple[str, ...] = ()
    max_documents: int | None = None
    counts_file: Path | None = None
    trust_remote_code: bool = False


def kept_tokens(settings: Retention, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that stay, sorted.

    Raises:
        PrunerError: a setting is not valid, or a text, file or tokenizer that it names cannot be read.
    """
    words = Subwords(tokenizer)
    named = ids_in(model.config) | (ids_in(model.generation_config) if model.can_generate() else set())
    protected = (named & words.tokens.keys()) | _template_ids(tokenizer)
    if settings.listed is not None:
        protected |= _listed_ids(settings.listed, words, tokenizer)
    counts = Counts(words.size)
    if settings.corpus:
        counts = count(tokenizer, settings.corpus, settings.counts_file, settings.max_documents)
    given_up: set[int] = set()
    if not settings.unseen_characters:
        given_up = words.unseen_characters(counts.values.tolist(), settings.min_count or 1)
    return choose(
        words,
        counts.values,
        settings.keep,
        min_count=settings.min_count,
        protected=protected,
        given_up=given_up,
        among=_permitted(settings, words, tokenizer),
        whole=counts.words if words.by_words and keeps_words(tokenizer, model.config) else None,
    )


def _permitted(settings: Retention, words: Subwords, tokenizer: PreTrainedTokenizerBase) -> set[int] | None:
    """Return the tokens that another tokenizer and scripts permit; None: all."""
    permitted: set[int] | None = None
    if settings.to_tokenizer:
        other = load_tokenizer(settings.to_tokenizer, trust_remote_code=settings.trust_remote_code)
        if other is None:
            raise no_tokenizer(f"--to_tokenizer {settings.to_tokenizer}")
        permitted = ids_of_tokenizer(words, Subwords(other))
    if settings.scripts:
        written = in_scripts(words, tokenizer, settings.scripts)
        permitted = written if permitted is None else permitted & written
    return permitted


def _template_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the tokens of an empty conversation in the chat template."""
    if not tokenizer.chat_template:
        return set()
    roles = [{"role": role, "content": ""} for role in ("system", "user", "assistant")]
    for messages in (roles, roles[1:]):
        try:
            frame = apply_template(tokenizer, messages, add_generation_prompt=True, tokenize=False)
        except PrunerError:  # a template may refuse a role or an order
            continue
        return set(tokenizer(str(frame), add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]
    return set()


def _listed_ids(file: Path, words: Subwords, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the tokens that a file lists, one per line, in the tokenizer's own writing or as text."""
    ids: set[int] = set()
    for line in read_list(file):
        in_text = [words.ids[line]] if line in words.ids else tokenizer(line, add_special_tokens=False)["input_ids"]
        ids.update(cast(list[int], in_text))
    return ids


def read_list(file: Path) -> list[str]:
    """Return the lines of a file of tokens that are not empty.

    Raises:
        PrunerError: the file cannot be read.
    """
    try:
        return list(filter(None, file.read_text(encoding="utf-8").splitlines()))
    except (OSError, UnicodeDecodeError) as error:
        raise PrunerError(f"cannot read {file}: {error}") from error
