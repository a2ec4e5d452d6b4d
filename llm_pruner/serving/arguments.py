"""Flags of ``llm-pruner export``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import PrunerError
from ..flags import Arguments, flag

Format = Literal["hf", "gguf", "nemotron-nas"]
GgufType = Literal["f32", "f16", "q8_0", "q4_k_m"]


@dataclass(kw_only=True)
class ExportArguments(Arguments):
    """Flags of ``llm-pruner export``."""

    model: str = flag("", "model to export: a folder, alias or hub id", aliases=("checkpoint",))
    output: str = flag("", "file (gguf) or folder (other formats) to write", aliases=("out",))
    format: Format = flag(
        "hf",
        "hf: plain checkpoint, layers padded to one width; gguf: file for llama.cpp; nemotron-nas: folder with "
        "block_configs, which vLLM, SGLang and TensorRT-LLM read natively",
    )
    type: GgufType | None = flag(None, "type of the matrices of a gguf file (default: f16)")
    standalone: bool = flag(
        False, "with --format hf: keep the widths, and write a modelling file that trust_remote_code=True reads"
    )
    allow_padding: bool = flag(False, "pad even if that adds back more than half of the removed parameters")
    trust_remote_code: bool = flag(False, "run modelling code that comes with the checkpoint")

    def check(self) -> None:
        """Refuse missing paths, and flags of another format.

        Raises:
            PrunerError: model or output is missing, or a flag does nothing with this format.
        """
        if not (self.model and self.output):
            raise PrunerError("give a model and what to write: llm-pruner export MODEL OUTPUT --format gguf")
        if self.type is not None and self.format != "gguf":
            raise PrunerError(f"--type {self.type} has no effect with --format {self.format}: leave it out")
        for name, of in (("standalone", ("hf",)), ("allow_padding", ("hf", "nemotron-nas"))):
            if getattr(self, name) and self.format not in of:
                raise PrunerError(f"--{name} has no effect with --format {self.format}: leave it out")
        if self.standalone and self.allow_padding:
            raise PrunerError(
                "--standalone and --allow_padding exclude each other: one keeps the widths, one pads them"
            )
