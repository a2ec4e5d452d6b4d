"""Surgery on ``tokenizer.json``: fewer tokens, each still reachable, and no text that can no longer be written.

What a tokenizer needs to go on working, by its model:

* BPE: a token comes about by a merge of two others, so these have to stay. Text falls back on single characters (the
  256 of byte-level BPE), or on byte tokens. Where text is first split into words, a token may also stay alone, for the
  words that are that token (``ignore_merges``): parts that only lead to it need no row then.
* Unigram (Kudo, arXiv 1804.10959): a piece needs no other. Text falls back on single characters, or on byte tokens.
* WordPiece: the same, a word on its first character and the ``##`` form of the others.

Pure: JSON documents and ids in, JSON documents and ids out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ..errors import PrunerError

MODELS = ("BPE", "Unigram", "WordPiece")
FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"
INSIDE = "\0"  # what no token of a byte-level tokenizer has in it


class Subwords:
    """A tokenizer as what its tokens need.

    Attributes:
        document: what ``tokenizer.json`` holds.
        tokens: every token as the tokenizer writes it, by id; added ones too.
        size: one more than the largest id.
        required: ids that must stay whatever else goes: added and special tokens, and what text falls back on.
        by_words: whether a token may stay without what it is merged from.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise PrunerError(
                f"{type(tokenizer).__name__} has no fast form: convert it with transformers.convert_slow_tokenizer and "
                "save it again"
            )
        self.document: dict[str, Any] = json.loads(backend.to_str())
        model = self.document["model"]
        if model.get("type") not in MODELS:
            raise PrunerError(f"a {model.get('type')} tokenizer cannot lose tokens without losing text")
        self.kind: str = model["type"]
        self.tokens = _vocabulary(model) | {t["id"]: t["content"] for t in self.document["added_tokens"]}
        self.ids = {token: i for i, token in self.tokens.items()}
        self.size = max(self.tokens, default=-1) + 1
        self.added = {token["id"] for token in self.document["added_tokens"]}
        self.required = self._required()
        affixes = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
        self.by_words = self.kind == "BPE" and self._byte_level() and not affixes
        self._merges = _merges(model) if self.kind == "BPE" else []
        self._parts: dict[int, tuple[int, ...] | None] = {}
        self._ranks = {pair: rank for rank, pair in reversed(list(enumerate(self._merges)))}

    def _required(self) -> set[int]:
        model = self.document["model"]
        out = self.added | {ids[at] for ids, at in _special_places(self.document.get("post_processor"))}
        unknown = model.get("unk_id") if self.kind == "Unigram" else self.ids.get(model.get("unk_token") or "")
        if unknown is not None:
            out.add(unknown)
        own = {i: token for i, token in self.tokens.items() if i not in self.added}
        if model.get("byte_fallback"):
            return out | {i for i, token in own.items() if _is_byte(token)}
        if self._byte_level():
            alphabet = set(bytes_to_unicode().values())
            return out | {i for i, token in own.items() if token in alphabet}
        if self.kind == "WordPiece":
            prefix = model["continuing_subword_prefix"]

            def letters(token: str) -> list[str]:
                """What stands for a token, character by character."""
                if token.startswith(prefix):
                    return [prefix + c for c in token.removeprefix(prefix)]
                return [token[0], *(prefix + c for c in token[1:])]
        else:
            suffix = model.get("end_of_word_suffix") or ""

            def letters(token: str) -> list[str]:
                return _characters(token, suffix)

        for i, token in own.items():
            single = letters(token) if token else []
            if len(single) == 1 or any(letter not in self.ids for letter in single):
                out.add(i)
        return out

    def _byte_level(self) -> bool:
        """Whether text reaches the model as bytes, each written as a character."""
        return '"ByteLevel"' in json.dumps([self.document["pre_tokenizer"], self.document["normalizer"]])

    def parts(self, i: int) -> tuple[int, ...] | None:
        """The tokens that a token is merged from, none for what needs no others; None if nothing leads to it."""
        if i not in self._parts:
            self._parts[i] = self._split(self.tokens[i]) if self.kind == "BPE" and i not in self.added else ()
        return self._parts[i]

    def _split(self, token: str) -> tuple[int, ...] | None:
        symbols = _characters(token, self.document["model"].get("end_of_word_suffix") or "")
        last: tuple[str, str] | None = None
        while len(symbols) > 1:  # as BPE does it: the earliest merge first
            none = len(self._ranks)
            rank, at = min((self._ranks.get(pair, none), at) for at, pair in enumerate(pairwise(symbols)))
            if rank == none:
                return () if _is_byte(token) or self.document["model"].get("ignore_merges") else None
            last = (symbols[at], symbols[at + 1])
            symbols[at : at + 2] = ["".join(last)]
        if last is None:
            return ()
        return (self.ids[last[0]], self.ids[last[1]]) if set(last) <= self.ids.keys() else None

    def needs(self, i: int, known: Iterable[int] = ()) -> set[int] | None:
        """A token and all that it takes to reach it, without what is ``known``; None if nothing leads to it."""
        known = known if isinstance(known, set) else set(known)
        out: set[int] = set()
        open_ = [i]
        while open_:
            token = open_.pop()
            if token in known or token in out:
                continue
            parts = self.parts(token)
            if parts is None:
                return None
            out.add(token)
            open_.extend(parts)
        return out

    def marked(self) -> Tokenizer | None:
        """The same tokenizer, but a token that does not begin a word has :attr:`size` added to its id.

        So counting tells words from their parts at the speed of ids alone. None if words do not matter.
        """
        if not self.by_words:
            return None
        document = json.loads(json.dumps(self.document))
        model = document["model"]
        model["vocab"] |= {INSIDE + token: i + self.size for token, i in model["vocab"].items()}
        model["merges"] = [pair for a, b in self._merges for pair in ([a, INSIDE + b], [INSIDE + a, INSIDE + b])]
        model["continuing_subword_prefix"] = INSIDE
        document["truncation"] = document["padding"] = None
        return Tokenizer.from_str(json.dumps(document))

    def cut(self, kept: list[int]) -> dict[str, Any]:
        """The document with only the ``kept`` tokens, ids in sorted order, which get new ids from 0 on."""
        new = {old: position for position, old in enumerate(kept)}
        out = json.loads(json.dumps(self.document))
        model = out["model"]
        if self.kind == "Unigram":
            model["vocab"] = [entry for i, entry in enumerate(model["vocab"]) if i in new]
            if model.get("unk_id") is not None:
                model["unk_id"] = new[model["unk_id"]]
        else:
            model["vocab"] = {token: new[i] for token, i in model["vocab"].items() if i in new}
        if self.kind == "BPE":
            there = model["vocab"]
            stays = [pair for pair in self._merges if {*pair, "".join(pair)} <= there.keys()]
            model["merges"] = [list(pair) for pair in stays]
            if self.by_words and not all(new.keys() >= set(self.parts(i) or ()) for i in kept):
                model["ignore_merges"] = True
        lost = [token["content"] for token in out["added_tokens"] if token["id"] not in new]
        if lost:
            raise PrunerError(f"the token {lost[0]!r} was added to the tokenizer and has to stay")
        for token in out["added_tokens"]:
            token["id"] = new[token["id"]]
        for ids, at in _special_places(out.get("post_processor")):
            ids[at] = new[ids[at]]
        if out.get("padding"):
            out["padding"]["pad_id"] = new[out["padding"]["pad_id"]]
        return out


def _vocabulary(model: dict[str, Any]) -> dict[int, str]:
    if isinstance(model["vocab"], list):
        return {i: entry[0] for i, entry in enumerate(model["vocab"])}
    return {i: token for token, i in model["vocab"].items()}


def _merges(model: dict[str, Any]) -> list[tuple[str, str]]:
    pairs = (m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"])
    return [(a, b) for a, b in pairs]


def _characters(token: str, suffix: str) -> list[str]:
    """What BPE begins with: characters, the last with the mark of a word's end."""
    if suffix and token.endswith(suffix) and token != suffix:
        word = token.removesuffix(suffix)
        return [*word[:-1], word[-1] + suffix]
    return list(token)


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _special_places(node: Any) -> Iterator[tuple[list[Any], int]]:
    """Where a post-processor holds the ids that it puts around a text: lists, and positions in them."""
    if isinstance(node, dict):
        for special in (node.get("special_tokens") or {}).values():
            yield from ((special["ids"], at) for at in range(len(special["ids"])))
        yield from ((node[name], 1) for name in ("sep", "cls") if name in node)
        for inner in node.get("processors", ()):
            yield from _special_places(inner)


def cut_tokenizer(tokenizer: PreTrainedTokenizerBase, kept: list[int], folder: str | Path) -> None:
    """Write the tokenizer with only the ``kept`` tokens into a folder; files of it that are there are replaced."""
    folder = Path(folder)
    words = Subwords(tokenizer)
    known = [i for i in kept if i in words.tokens]  # an embedding may have rows that no token has
    tokenizer.save_pretrained(folder)
    document = words.cut(known)
    (folder / FILE).write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
    file = folder / CONFIG
    config = json.loads(file.read_text(encoding="utf-8"))
    if words.kind == "BPE" and document["model"].get("ignore_merges"):
        config |= _as_it_is(tokenizer)
    new = {str(old): str(position) for position, old in enumerate(kept)}
    if "added_tokens_decoder" in config:
        config["added_tokens_decoder"] = {new[i]: entry for i, entry in config["added_tokens_decoder"].items()}
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for other in ("vocab.json", "merges.txt", "vocab.txt", "added_tokens.json"):  # the same once more, in old forms
        (folder / other).unlink(missing_ok=True)
    for model in folder.glob("*.model"):
        _cut_sentencepiece(model, words, known)


def keeps_words(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> bool:
    """Whether :class:`AutoTokenizer` gives back ``ignore_merges`` beside such a config: some types insist on a class
    that builds its own tokenizer from vocabulary and merges."""
    with TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        Tokenizer(BPE(vocab={"a": 0}, merges=[], ignore_merges=True)).save(str(Path(folder) / FILE))
        (Path(folder) / CONFIG).write_text(json.dumps(_as_it_is(tokenizer)), encoding="utf-8")
        loaded: Any = AutoTokenizer.from_pretrained(folder)
        return bool(getattr(loaded.backend_tokenizer.model, "ignore_merges", False))


def _as_it_is(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What makes transformers load ``tokenizer.json`` instead of building a tokenizer of the model's own class."""
    return {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": tokenizer.model_input_names}


def _cut_sentencepiece(file: Path, words: Subwords, kept: list[int]) -> None:
    """The same in SentencePiece's own file, where its pieces are the tokenizer's; else the file goes."""
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
    new = {old: position for position, old in enumerate(kept)}
    del model.pieces[:]
    model.pieces.extend(piece for i, piece in enumerate(pieces) if i in new)
    model.trainer_spec.vocab_size = len(model.pieces)
    for name in ("unk_id", "bos_id", "eos_id", "pad_id"):
        old = getattr(model.trainer_spec, name)
        setattr(model.trainer_spec, name, new.get(old, -1) if old >= 0 else old)
    file.write_bytes(model.SerializeToString())
