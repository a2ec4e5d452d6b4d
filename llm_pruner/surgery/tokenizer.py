"""Cut ``tokenizer.json``: fewer tokens, each still reachable, and any text can still be written.

Conditions by the tokenizer's model:

* BPE: a merge of two tokens makes a token, so both have to stay. Text falls back on single characters (the 256 of
  byte-level BPE) or on byte tokens. Where text is first split into words, a token may also stay alone, as a whole word
  (``ignore_merges``), without the tokens that it is merged from.
* Unigram (Kudo, arXiv 1804.10959): no token needs another. Text falls back on single characters or on byte tokens.
* WordPiece: the same; a word falls back on its first character and the ``##`` form of the others.

Pure functions of JSON documents and ids, except :func:`save_tokenizer`, :func:`cut_tokenizer` and
:func:`keeps_words`.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ..errors import PrunerError
from ..files import read_json
from ..hub import cached_file

MODELS = ("BPE", "Unigram", "WordPiece")
FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"
LEGACY_FILES = ("vocab.json", "merges.txt", "vocab.txt", "added_tokens.json")  # the same content in older formats
FROM_LOADING = ("is_local", "local_files_only")  # arguments of from_pretrained, which transformers writes with the rest
INSIDE = "\0"  # in no token of a byte-level tokenizer


class Subwords:
    """The tokens of a tokenizer, and which other tokens each of them needs.

    Attributes:
        document: content of ``tokenizer.json``.
        kind: ``BPE``, ``Unigram`` or ``WordPiece``.
        tokens: every token as the tokenizer writes it, by id; added ones too.
        ids: the reverse.
        size: one more than the largest id.
        added: ids of added tokens.
        required: ids that must stay in any case: added and special tokens, and the tokens that text falls back on.
        falls_back_on_bytes: True if any text can be written with the tokens of single bytes.
        by_words: True where a token may stay without the tokens that it is merged from.
        merges: pairs of tokens that BPE merges, earliest first.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.document = _read_document(tokenizer)
        model = self.document["model"]
        self.kind: str = model["type"]
        self.tokens = _vocabulary(model) | {t["id"]: t["content"] for t in self.document["added_tokens"]}
        self.ids = {token: i for i, token in self.tokens.items()}
        self.size = max(self.tokens, default=-1) + 1
        self.added = {token["id"] for token in self.document["added_tokens"]}
        self.falls_back_on_bytes = bool(model.get("byte_fallback")) or self._byte_level()
        self.required = self._special_ids() | self._fallback_ids()
        affixes = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
        self.by_words = self.kind == "BPE" and self._byte_level() and not affixes
        self.merges = _merges(model) if self.kind == "BPE" else []
        self._ranks = {pair: rank for rank, pair in reversed(list(enumerate(self.merges)))}
        self._constituents: dict[int, tuple[int, ...] | None] = {}
        self._backend: Tokenizer = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
        self._whole: dict[int, bool] = {}

    def _special_ids(self) -> set[int]:
        """Return added tokens, those that a post-processor puts around a text, and the unknown token."""
        model = self.document["model"]
        special = self.added | {ids[at] for ids, at in _special_places(self.document.get("post_processor"))}
        unknown = model.get("unk_id") if self.kind == "Unigram" else self.ids.get(model.get("unk_token") or "")
        return special if unknown is None else special | {unknown}

    def _fallback_ids(self) -> set[int]:
        """Return the tokens that text falls back on: bytes, or characters."""
        model = self.document["model"]
        own = {i: token for i, token in self.tokens.items() if i not in self.added}
        if model.get("byte_fallback"):
            return {i for i, token in own.items() if _is_byte(token)}
        if self._byte_level():
            alphabet = set(bytes_to_unicode().values())
            return {i for i, token in own.items() if token in alphabet}
        spelled = {i: _spell(model, token) for i, token in own.items()}
        return {i for i, letters in spelled.items() if len(letters) == 1 or not set(letters) <= self.ids.keys()}

    def stays_whole(self, i: int) -> bool:
        """Return True if the text of a token is not split before the tokenizer's model reads it.

        No text has a token that is split, such as BERT's ``[unused0]``.
        """
        if i not in self._whole:
            prefix = self.document["model"].get("continuing_subword_prefix") or ""
            text = self.tokens[i].removeprefix(prefix) if prefix else self._backend.decode([i])
            normalizer, splitter = self._backend.normalizer, self._backend.pre_tokenizer
            text = normalizer.normalize_str(text) if normalizer else text
            self._whole[i] = splitter is None or len(splitter.pre_tokenize_str(text)) == 1
        return self._whole[i]

    def unseen_characters(self, counts: Sequence[int], least: int = 1) -> set[int]:
        """Return the required tokens of single characters that no token of a text has.

        Without them, text with such characters has unknown tokens.

        Args:
            counts: occurrences in the text, by id.
            least: occurrences of a token that count.

        Raises:
            PrunerError: the tokenizer falls back on bytes, of which all stay.
        """
        if self.falls_back_on_bytes:
            raise PrunerError(
                "--characters corpus is not valid for a tokenizer that falls back on bytes: leave it out, it keeps no "
                "characters"
            )
        model, special = self.document["model"], self._special_ids()
        seen = [i for i in self.tokens.keys() - special if i < len(counts) and counts[i] >= least]
        characters = {self._plain(c) for i in seen for c in _spell(model, self.tokens[i])}
        return {
            i
            for i in self.required - special
            if not {self._plain(c) for c in _spell(model, self.tokens[i])} <= characters
        }

    def _plain(self, character: str) -> str:
        """Return a character as it stands in a text, without the marks of its place in a word."""
        model = self.document["model"]
        prefix, suffix = (model.get(name) or "" for name in ("continuing_subword_prefix", "end_of_word_suffix"))
        return character.removeprefix(prefix).removesuffix(suffix) or character

    def _byte_level(self) -> bool:
        """Return True if text reaches the model as bytes, each written as a character."""
        return '"ByteLevel"' in json.dumps([self.document["pre_tokenizer"], self.document["normalizer"]])

    def constituents(self, i: int) -> tuple[int, ...] | None:
        """Return the tokens that a token is merged from: none for a token that needs no others, None if BPE never
        makes it."""
        if i not in self._constituents:
            merged = self.kind == "BPE" and i not in self.added
            self._constituents[i] = self._last_merge(self.tokens[i]) if merged else ()
        return self._constituents[i]

    def _last_merge(self, token: str) -> tuple[int, ...] | None:
        """Merge the characters of a token as BPE does, the earliest merge first; return the last pair."""
        symbols = _characters(token, self.document["model"].get("end_of_word_suffix") or "")
        last: tuple[str, str] | None = None
        while len(symbols) > 1:
            none = len(self._ranks)
            rank, at = min((self._ranks.get(pair, none), at) for at, pair in enumerate(pairwise(symbols)))
            if rank == none:
                return () if _is_byte(token) or self.document["model"].get("ignore_merges") else None
            last = (symbols[at], symbols[at + 1])
            symbols[at : at + 2] = ["".join(last)]
        if last is None:
            return ()
        return (self.ids[last[0]], self.ids[last[1]]) if set(last) <= self.ids.keys() else None

    def needs(self, i: int, reached: Iterable[int] = ()) -> set[int] | None:
        """Return a token and all that it is merged from, without what is ``reached``; None if BPE never makes it."""
        reached = reached if isinstance(reached, set) else set(reached)
        needed: set[int] = set()
        pending = [i]
        while pending:
            token = pending.pop()
            if token in reached or token in needed:
                continue
            constituents = self.constituents(token)
            if constituents is None:
                return None
            needed.add(token)
            pending.extend(constituents)
        return needed

    def marked(self) -> Tokenizer | None:
        """Return the same tokenizer, but with :attr:`size` added to the id of a token that does not begin a word.

        Counting can then tell words from their parts at full speed. None if tokens cannot stay as words.
        """
        if not self.by_words:
            return None
        document = copy.deepcopy(self.document)
        model = document["model"]
        model["vocab"] |= {INSIDE + token: i + self.size for token, i in model["vocab"].items()}
        model["merges"] = [pair for a, b in self.merges for pair in ([a, INSIDE + b], [INSIDE + a, INSIDE + b])]
        model["continuing_subword_prefix"] = INSIDE
        document["truncation"] = document["padding"] = None
        try:
            return Tokenizer.from_str(json.dumps(document))
        except Exception as error:  # the tokenizers package raises nothing narrower
            raise PrunerError(f"the merges of the tokenizer contradict its vocabulary: {error}") from error


def cut_document(words: Subwords, kept: list[int]) -> dict[str, Any]:
    """Return ``tokenizer.json`` with only the ``kept`` tokens, sorted ids, which get new ids from 0 on.

    Raises:
        PrunerError: an added token is not kept.
    """
    new_id = {old: position for position, old in enumerate(kept)}
    document = copy.deepcopy(words.document)
    lost = [token["content"] for token in document["added_tokens"] if token["id"] not in new_id]
    if lost:
        raise PrunerError(f"the token {lost[0]!r} was added to the tokenizer and has to stay")
    _cut_model(document["model"], words, new_id)
    for token in document["added_tokens"]:
        token["id"] = new_id[token["id"]]
    for ids, at in _special_places(document.get("post_processor")):
        ids[at] = new_id[ids[at]]
    if document.get("padding"):
        document["padding"]["pad_id"] = new_id[document["padding"]["pad_id"]]
    return document


def _cut_model(model: dict[str, Any], words: Subwords, new_id: dict[int, int]) -> None:
    """Cut vocabulary and merges, in place."""
    if words.kind == "Unigram":
        model["vocab"] = [entry for i, entry in enumerate(model["vocab"]) if i in new_id]
        if model.get("unk_id") is not None:
            model["unk_id"] = new_id[model["unk_id"]]
        return
    vocabulary = model["vocab"] = {token: new_id[i] for token, i in model["vocab"].items() if i in new_id}
    if words.kind == "BPE":
        model["merges"] = [list(pair) for pair in words.merges if {*pair, "".join(pair)} <= vocabulary.keys()]
        if words.by_words and not all(new_id.keys() >= set(words.constituents(i) or ()) for i in new_id):
            model["ignore_merges"] = True


def _read_document(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the content of ``tokenizer.json``.

    Raises:
        PrunerError: the tokenizer has none, or its model cannot be cut.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise PrunerError(
            f"{type(tokenizer).__name__} has no fast form: convert it with transformers.convert_slow_tokenizer and "
            "save it again"
        )
    document: dict[str, Any] = json.loads(backend.to_str())
    kind = document["model"].get("type")
    if kind not in MODELS:
        raise PrunerError(f"a {kind} tokenizer cannot lose tokens without losing text: use one of {', '.join(MODELS)}")
    return document


def _vocabulary(model: dict[str, Any]) -> dict[int, str]:
    if isinstance(model["vocab"], list):
        return {i: entry[0] for i, entry in enumerate(model["vocab"])}
    return {i: token for token, i in model["vocab"].items()}


def _merges(model: dict[str, Any]) -> list[tuple[str, str]]:
    pairs = (m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"])
    return [(a, b) for a, b in pairs]


def _spell(model: dict[str, Any], token: str) -> list[str]:
    """Return the tokens of single characters that spell a token."""
    if model["type"] != "WordPiece":
        return _characters(token, model.get("end_of_word_suffix") or "")
    prefix = model["continuing_subword_prefix"]
    if token.startswith(prefix):
        return [prefix + c for c in token.removeprefix(prefix)]
    return [*token[:1], *(prefix + c for c in token[1:])]


def _characters(token: str, suffix: str) -> list[str]:
    """Split a token into the symbols that BPE begins with: characters, the last with the suffix of a word's end."""
    if suffix and token.endswith(suffix) and token != suffix:
        word = token.removesuffix(suffix)
        return [*word[:-1], word[-1] + suffix]
    return list(token)


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _special_places(node: Any) -> Iterator[tuple[list[Any], int]]:
    """Yield the places of a post-processor that hold special ids: lists and positions in them."""
    if isinstance(node, dict):
        for special in (node.get("special_tokens") or {}).values():
            yield from ((special["ids"], at) for at in range(len(special["ids"])))
        yield from ((node[name], 1) for name in ("sep", "cls") if name in node)
        for inner in node.get("processors", ()):
            yield from _special_places(inner)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer's files, with the truncation and padding of its own file, not those of its latest use.

    Raises:
        PrunerError: transformers refuses to, as for a chat template whose name leads out of the folder.
    """
    try:
        tokenizer.save_pretrained(folder)
    except ValueError as error:
        raise PrunerError(f"the tokenizer cannot be written: {error}") from error
    if (file := folder / CONFIG).is_file():
        config = {name: value for name, value in read_json(file).items() if name not in FROM_LOADING}
        _write_json(file, config, indent=2)
    if (file := folder / FILE).is_file():
        document = read_json(file)
        if (restored := document | _own_limits(tokenizer)) != document:
            _write_json(file, restored, indent=2)


def _own_limits(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return truncation and padding as the tokenizer's own file says; encoding with a limit leaves others in it."""
    local = Path(tokenizer.name_or_path) / FILE
    file = local if local.is_file() else cached_file(tokenizer.name_or_path, FILE)
    own = {} if file is None else read_json(file)
    return {name: own.get(name) for name in ("truncation", "padding")}


def _write_json(file: Path, document: dict[str, Any], indent: int | None = None) -> None:
    text = json.dumps(document, indent=indent, ensure_ascii=False)
    file.write_text(text + "\n" * (indent is not None), encoding="utf-8")


def cut_tokenizer(tokenizer: PreTrainedTokenizerBase, kept: list[int], folder: str | Path) -> None:
    """Write a tokenizer with only the ``kept`` tokens into a folder, in place of the tokenizer files there.

    Args:
        kept: sorted ids; ids that no token has, such as those of padding rows of the embedding, are skipped.
    """
    folder = Path(folder)
    words = Subwords(tokenizer)
    words.document |= _own_limits(tokenizer)
    kept_tokens = [i for i in kept if i in words.tokens]
    save_tokenizer(tokenizer, folder)
    document = cut_document(words, kept_tokens)
    _write_json(folder / FILE, document)
    file = folder / CONFIG
    config = read_json(file)
    if words.kind == "BPE" and document["model"].get("ignore_merges"):
        config |= _plain_class(tokenizer)
    new_id = {str(old): str(position) for position, old in enumerate(kept)}
    if "added_tokens_decoder" in config:
        config["added_tokens_decoder"] = {new_id[i]: entry for i, entry in config["added_tokens_decoder"].items()}
    _write_json(file, config, indent=2)
    for name in LEGACY_FILES:
        (folder / name).unlink(missing_ok=True)
    for model in folder.glob("*.model"):
        _cut_sentencepiece(model, words, kept_tokens)


def keeps_words(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> bool:
    """Return True if :class:`AutoTokenizer` restores ``ignore_merges`` beside such a config.

    Some model types insist on a class that builds its own tokenizer from vocabulary and merges.
    """
    with TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        Tokenizer(BPE(vocab={"a": 0}, merges=[], ignore_merges=True)).save(str(Path(folder) / FILE))
        (Path(folder) / CONFIG).write_text(json.dumps(_plain_class(tokenizer)), encoding="utf-8")
        loaded: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        return bool(getattr(loaded.backend_tokenizer.model, "ignore_merges", False))


def _plain_class(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the config entries that make transformers load ``tokenizer.json`` as it is."""
    return {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": tokenizer.model_input_names}


def _cut_sentencepiece(file: Path, words: Subwords, kept: list[int]) -> None:
    """Cut SentencePiece's own file as well; remove it where its pieces are not the tokenizer's."""
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError:
        file.unlink()
        return
    model: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    model.ParseFromString(file.read_bytes())
    pieces = list(model.pieces)
    if any(words.tokens.get(i) != piece.piece for i, piece in enumerate(pieces)):
        file.unlink()
        return
    new_id = {old: position for position, old in enumerate(kept)}
    del model.pieces[:]
    model.pieces.extend(piece for i, piece in enumerate(pieces) if i in new_id)
    model.trainer_spec.vocab_size = len(model.pieces)
    for name in ("unk_id", "bos_id", "eos_id", "pad_id"):
        old = getattr(model.trainer_spec, name)
        setattr(model.trainer_spec, name, new_id.get(old, -1) if old >= 0 else old)
    file.write_bytes(model.SerializeToString())
