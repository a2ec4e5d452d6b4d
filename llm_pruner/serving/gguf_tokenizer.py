"""Write a byte-level BPE tokenizer into a GGUF file."""

from __future__ import annotations

import json
from typing import Any

import gguf
from transformers import PreTrainedTokenizerBase

from ..errors import PrunerError
from ..logs import log
from ..models.generate import leading_tokens

# Regular expressions that split text before byte-pair encoding, by llama.cpp's name for them.
LETTERS_AND_DIGITS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {
    LETTERS_AND_DIGITS.replace("DIGITS", "{1,3}"): "llama-bpe",
    LETTERS_AND_DIGITS.replace("DIGITS", ""): "qwen2",
}
WHOLE_WORDS = ("llama-bpe",)  # where llama.cpp looks a word up before it applies merges
BYTE_LEVEL, SINGLE_DIGITS = "gpt-2", "smollm"  # ByteLevel's own expression; the same after splitting digits


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Add tokens, merges, special tokens and the chat template.

    Args:
        vocab_size: rows of the embeddings; ids without a token are filled.

    Raises:
        PrunerError: llama.cpp has no name for how the tokenizer splits text.
    """
    document = json.loads(tokenizer.backend_tokenizer.to_str())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split := split_name(document))
    if document["model"].get("ignore_merges") and split not in WHOLE_WORDS:
        log.warning(
            "gguf: the tokenizer has tokens for whole words alone (ignore_merges), and llama.cpp splits these words: "
            "texts have more tokens there"
        )
    tokens, types = _tokens(document, vocab_size)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in document["model"]["merges"]])
    for name in ("bos", "eos", "pad", "unk"):
        if (token := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(token)
    writer.add_add_bos_token(leading_tokens(tokenizer)[:1] == [tokenizer.bos_token_id])
    template: Any = tokenizer.chat_template
    if isinstance(template, dict):  # several, by name
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        writer.add_chat_template(template)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Refuse a tokenizer that :func:`add_tokenizer` cannot write.

    Raises:
        PrunerError: it is missing, or no byte-level BPE with merges that llama.cpp has a name for.
    """
    if tokenizer is None or not hasattr(tokenizer, "backend_tokenizer"):
        raise PrunerError("--format gguf needs a tokenizer.json beside the model: put the original's files there")
    document = json.loads(tokenizer.backend_tokenizer.to_str())
    split_name(document)
    if not document["model"].get("merges"):
        raise PrunerError("--format gguf: no merge of two tokens is left in the vocabulary, and llama.cpp needs some")


def split_name(document: dict[str, Any]) -> str:
    """Return llama.cpp's name for how a tokenizer splits text before its merges.

    Args:
        document: content of tokenizer.json.

    Raises:
        PrunerError: there is none.
    """
    steps = document.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    kinds = [step.get("type") for step in steps]
    if document["model"]["type"] == "BPE" and "ByteLevel" in kinds:
        patterns = [step["pattern"].get("Regex") for step in steps if step["type"] == "Split"]
        if not patterns:
            digits = any(step["type"] == "Digits" and step["individual_digits"] for step in steps)
            return SINGLE_DIGITS if digits else BYTE_LEVEL
        if len(patterns) == 1 and patterns[0] in SPLITS:
            return SPLITS[patterns[0]]
    raise PrunerError(
        f"--format gguf: llama.cpp has no name for this tokenizer ({document['model']['type']}; "
        f"{', '.join(map(str, kinds))}); its own converter knows more of them, and reads what --format hf writes"
    )


def _tokens(document: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Return every token and its type, in the order of their ids."""
    tokens = {index: (token, gguf.TokenType.NORMAL) for token, index in document["model"]["vocab"].items()}
    for added in document.get("added_tokens", []):
        kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        tokens[added["id"]] = (added["content"], kind)
    rows = [tokens.get(i, (f"[PAD{i}]", gguf.TokenType.UNUSED)) for i in range(vocab_size)]
    return [token for token, _ in rows], [int(kind) for _, kind in rows]
