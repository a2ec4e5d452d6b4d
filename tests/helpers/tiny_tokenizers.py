"""Small tokenizers of every family, trained here, and each cut to three quarters."""

import json
from functools import cache
from tempfile import TemporaryDirectory

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llm_pruner.data import documents
from llm_pruner.surgery.tokenizer import Subwords, cut_tokenizer
from llm_pruner.vocabulary.choosing import choose
from llm_pruner.vocabulary.counting import count

TEXTS = [t for _, t in zip(range(120), documents("python-docs"), strict=False)]
TEXTS += ["Größe und Länge, façade, naïve.", "Привет, мир", "你好世界", "שלום"] * 20
SPECIAL = ["<unk>", "<s>", "</s>"]


def byte_level() -> Tokenizer:
    """As GPT-2's, SmolLM2's and Bloom's."""
    out = Tokenizer(models.BPE())
    out.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    out.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    out.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(vocab_size=800, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    out.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return out


def byte_fallback() -> Tokenizer:
    """SentencePiece's BPE as Llama-2's, Gemma's and Mistral's: characters, and bytes for those that it has not."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=700, special_tokens=SPECIAL, limit_alphabet=80, show_progress=False)
    )
    model = json.loads(trained.to_str())["model"]
    vocabulary = dict(model["vocab"])
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    merges = [tuple(pair) for pair in model["merges"]]
    out = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    out.add_special_tokens(SPECIAL)
    out.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(" ", 1, 0)
    out.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    return out


def unigram() -> Tokenizer:
    """As T5's and XGLM's."""
    out = Tokenizer(models.Unigram())
    out.pre_tokenizer = pre_tokenizers.Metaspace()
    out.decoder = decoders.Metaspace()
    out.train_from_iterator(
        TEXTS, trainers.UnigramTrainer(vocab_size=700, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    )
    return out


def wordpiece() -> Tokenizer:
    """As BERT's."""
    out = Tokenizer(models.WordPiece(unk_token="<unk>"))
    out.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    out.decoder = decoders.WordPiece()
    out.train_from_iterator(
        TEXTS, trainers.WordPieceTrainer(vocab_size=900, special_tokens=SPECIAL, show_progress=False)
    )
    out.post_processor = processors.BertProcessing(("</s>", 2), ("<s>", 1))
    return out


FAMILIES = {"byte level": byte_level, "byte fallback": byte_fallback, "unigram": unigram, "wordpiece": wordpiece}


class Family:
    """A tokenizer, its counts, and the tokenizer cut to three quarters."""

    def __init__(self, name: str):
        self.name = name
        fast = FAMILIES[name]()
        self.large = PreTrainedTokenizerFast(
            tokenizer_object=fast, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
        )
        self.words = Subwords(self.large)
        self.counts = count(self.large, ["python-docs"])
        self.kept = choose(self.words, self.counts.values, keep="0.75")
        with TemporaryDirectory() as folder:
            cut_tokenizer(self.large, self.kept, folder)
            self.small = AutoTokenizer.from_pretrained(folder)
        self.new = {old: position for position, old in enumerate(self.kept)}


family_of = cache(Family)  # training takes seconds, so once for all test modules
