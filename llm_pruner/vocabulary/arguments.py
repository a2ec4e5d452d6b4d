"""Flags of ``llm-pruner vocab``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..choices import DEFAULT_MODEL, GENERAL, Dtype
from ..errors import PrunerError
from ..flags import Arguments, check_at_least, flag

DEFAULT_OUTPUT = "vocab_log"


@dataclass(kw_only=True)
class VocabArguments(Arguments):
    """Flags of ``llm-pruner vocab``."""

    model: str = flag(
        DEFAULT_MODEL,
        "alias of the embedded model, hub id, folder, or .gguf file",
        group="model",
        aliases=("base_model",),
    )
    device: str = flag("auto", "device: auto, cpu, cuda, cuda:1, mps, ...", group="model")
    dtype: Dtype = flag("auto", "dtype of the weights", group="model")
    trust_remote_code: bool = flag(False, "run modelling code that comes with the checkpoint", group="model")
    keep: str | None = flag(
        None, "tokens to keep: 15000, 0.5 (a share), or coverage=0.9999 (of the counted tokens)", group="tokens"
    )
    min_count: int = flag(0, "keep only tokens that occur at least N times in --corpus", group="tokens")
    to_tokenizer: str | None = flag(None, "keep the tokens of this tokenizer, a subset of the model's", group="tokens")
    languages: list[str] = flag([], "keep tokens in the scripts of these languages, such as en,zh", group="tokens")
    scripts: list[str] = flag([], "keep tokens in these scripts, such as Han,Latin", group="tokens")
    characters: Literal["all", "corpus"] = flag(
        "all",
        "characters that stay writable (corpus: only those of --corpus, where the tokenizer does not fall back on "
        "bytes; others become unknown tokens)",
        group="tokens",
    )
    keep_tokens: str | None = flag(
        None, "file of tokens to keep whatever the other flags say, one per line", group="tokens"
    )
    corpus: list[str] = flag([], "texts to count tokens in: hub data sets, embedded texts, or files", group="counting")
    max_documents: int = flag(200_000, "documents to count in a data set on the hub (0: all)", group="counting")
    save_counts: str | None = flag(None, "JSON file that keeps the token counts for further runs", group="counting")
    eval_dataset: str = flag(GENERAL, "text to compare both models on, not one of --corpus", group="evaluation")
    max_windows: int = flag(
        0,
        "compare only on the text of the original's first N windows of 128 tokens (0: all text)",
        group="evaluation",
    )
    output: str = flag(DEFAULT_OUTPUT, "folder of the new checkpoint", group="output", aliases=("output_dir",))
    dequantize: bool = flag(
        False, "write a quantized model in 16 bits (default: slice its quantized files)", group="output"
    )
    quiet: bool = flag(False, "show no progress and no log, only results, warnings and errors", group="output")

    def check(self) -> None:
        """Refuse arguments that cannot work.

        Raises:
            PrunerError: a number is out of range, no flag says which tokens stay, or counts are needed and no corpus is
                given.
        """
        check_at_least(self, 0, "min_count", "max_windows", "max_documents")
        if not (self.keep or self.min_count or self.to_tokenizer or self.languages or self.scripts):
            raise PrunerError("say which tokens stay: --keep, --min_count, --to_tokenizer, --languages or --scripts")
        if (self.keep or self.min_count) and not self.corpus:
            raise PrunerError("--keep and --min_count need counts of tokens: give --corpus")
        if self.characters == "corpus" and not self.corpus:
            raise PrunerError("--characters corpus needs the characters of a text: give --corpus")
