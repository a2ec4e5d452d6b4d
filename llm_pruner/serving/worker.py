"""Run one model in an engine, in a process of its own: a request per line of standard input, an answer per line.

    python -m llm_pruner.serving.worker ENGINE MODEL SEQUENCES TOKENS [trust]

ENGINE is ``vllm`` (MODEL is a folder) or ``llama.cpp`` (a GGUF file); SEQUENCES of TOKENS tokens fit at once. A request
is JSON: ``{"next": ids}`` asks for the most probable next tokens, ``{"batch": n, "prompt": k, "new_tokens": m,
"seed": s}`` for the seconds in which n random prompts of k tokens are continued by m, ``{"bytes": true}`` for memory.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import torch

from .llama_cpp import LlamaCpp

IDS = 256  # random prompts are of so many different tokens, which every vocabulary has
Complete = Callable[[list[list[int]], int], Any]  # continue prompts by so many tokens
Next = Callable[[list[int]], dict[int, float]]  # log-probabilities of the most probable next tokens


def main() -> None:
    # Answers have standard output to themselves: what engines and the processes that they start print goes elsewhere.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    engine, model, sequences, tokens, *trust = sys.argv[1:]
    load = {"vllm": _load_vllm, "llama.cpp": _load_llama_cpp}[engine]
    complete, next_tokens = load(model, int(sequences), int(tokens), bool(trust))
    answers.write("{}\n")
    for line in sys.stdin:
        answers.write(f"{json.dumps(_answer(json.loads(line), complete, next_tokens))}\n")


def _answer(request: dict[str, Any], complete: Complete, next_tokens: Next) -> Any:
    if "next" in request:
        return next_tokens(request["next"])
    if "bytes" in request:
        process = psutil.Process()
        return sum(p.memory_info().rss for p in [process, *process.children(recursive=True)])
    draw = torch.Generator().manual_seed(request["seed"])  # prompts differ, so that none is answered from a cache
    prompts = torch.randint(3, IDS, (request["batch"], request["prompt"]), generator=draw).tolist()
    began = time.perf_counter()
    complete(prompts, request["new_tokens"])
    return time.perf_counter() - began


def _load_vllm(model: str, sequences: int, tokens: int, trust: bool) -> tuple[Complete, Next]:
    from vllm import LLM, SamplingParams

    engine = LLM(
        model,
        trust_remote_code=trust,
        dtype="auto" if torch.cuda.is_available() else "float32",
        max_model_len=tokens,
        max_num_seqs=sequences,
        skip_tokenizer_init=True,
        enforce_eager=not torch.cuda.is_available(),
    )

    def complete(prompts: list[list[int]], new_tokens: int, top: int | None = None) -> Any:
        settings = SamplingParams(temperature=0, max_tokens=new_tokens, logprobs=top, ignore_eos=True, detokenize=False)
        return engine.generate([{"prompt_token_ids": ids} for ids in prompts], settings, use_tqdm=False)

    def next_tokens(ids: list[int]) -> dict[int, float]:
        (found,) = complete([ids], 1, top=8)
        return {token: value.logprob for token, value in found.outputs[0].logprobs[0].items()}

    return complete, next_tokens


def _load_llama_cpp(model: str, sequences: int, tokens: int, trust: bool) -> tuple[Complete, Next]:
    threads = int(os.environ.get("OMP_NUM_THREADS", psutil.cpu_count(logical=False) or 1))
    engine = LlamaCpp(Path(model), sequences=sequences, tokens=tokens, threads=threads)
    pool = ThreadPoolExecutor(sequences)

    def complete(prompts: list[list[int]], new_tokens: int) -> Any:
        return list(pool.map(lambda ids: engine.complete(ids, new_tokens), prompts))

    return complete, engine.next_log_probabilities


if __name__ == "__main__":
    main()
