"""Run GGUF files in llama.cpp: its library by the package xllamacpp, its program ``llama-quantize``."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

from ..errors import PrunerError
from ..optional import require

QUANTIZER = "llama-quantize"
CONTEXT = 2048  # tokens per sequence
TOP = 8  # log-probabilities that are compared


class LlamaCpp:
    """A GGUF file loaded by llama.cpp.

    Args:
        file: GGUF file.
        sequences: most sequences that are continued at once.
        tokens: most tokens of a sequence.
        threads: of the CPU.

    Raises:
        PrunerError: xllamacpp is not installed, or llama.cpp refuses the file.
    """

    def __init__(self, file: Path, *, sequences: int = 1, tokens: int = CONTEXT, threads: int = 2):
        require("xllamacpp", "llama-cpp", "GGUF files are run by")
        import xllamacpp

        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(file)
        parameters.n_ctx, parameters.n_parallel, parameters.warmup = tokens * sequences, sequences, False
        parameters.cpuparams.n_threads, parameters.verbosity = threads, 0
        try:
            self._server = xllamacpp.Server(parameters)
        except RuntimeError as error:
            raise PrunerError(f"llama.cpp cannot read {file}: {error}") from error

    def complete(self, ids: list[int], new_tokens: int, *, top: int = 0) -> dict[str, Any]:
        """Continue a prompt greedily; return llama.cpp's answer, with timings and ``top`` log-probabilities by token.

        Raises:
            PrunerError: llama.cpp answers with an error.
        """
        request = {"prompt": ids, "n_predict": new_tokens, "temperature": 0, "cache_prompt": False, "ignore_eos": True}
        answer = self._server.handle_completions(request | ({"n_probs": top} if top else {}))
        if "error" in answer:
            raise PrunerError(f"llama.cpp: {answer['error'].get('message', answer['error'])}")
        return dict(answer)

    def next_log_probabilities(self, ids: list[int]) -> dict[int, float]:
        """Return the log-probabilities of the :data:`TOP` most probable next tokens, by their ids."""
        content = self.complete(ids, 1, top=TOP)["choices"][0]["logprobs"]["content"]
        return {entry["id"]: entry["logprob"] for entry in content[0]["top_logprobs"]}


def quantize(source: Path, target: Path, kind: str) -> None:
    """Quantize a GGUF file with ``llama-quantize``.

    Args:
        kind: llama.cpp's name of the type, such as ``q4_k_m``.

    Raises:
        PrunerError: the program is missing or fails.
    """
    program = find_quantizer()
    run = subprocess.run(
        [program, str(source), str(target), kind.upper()], capture_output=True, encoding="utf-8", errors="replace"
    )
    if run.returncode or not target.is_file():
        last = (run.stderr or run.stdout).strip().splitlines()[-1:] or ["no output"]
        raise PrunerError(f"{QUANTIZER} failed: {last[0]}")


def find_quantizer() -> str:
    """Return the path of ``llama-quantize``.

    Raises:
        PrunerError: it is not on the PATH.
    """
    program = shutil.which(QUANTIZER)
    if program is None:
        raise PrunerError(
            f"this type is made by llama.cpp's own {QUANTIZER}, which is not on the PATH: install llama.cpp"
        )
    return program
