"""Run one folder in vLLM, in a process of its own: read a request from standard input, print the answer.

The request is JSON with ``folder``, ``trust_remote_code`` and either ``ids`` (a prompt, whose most probable next tokens
are answered) or ``batches``, ``prompt_tokens`` and ``new_tokens`` (speeds are). The answer is the last line.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB, where vLLM runs on a CPU
ANSWER = "llm-pruner answer: "  # marks the line among what vLLM prints
ROUNDS = 3
TOP = 8


def main() -> None:
    from vllm import LLM, SamplingParams

    request = json.load(sys.stdin)
    longest = len(request.get("ids", [])) or request["prompt_tokens"] + request["new_tokens"]
    engine = LLM(
        request["folder"],
        trust_remote_code=request["trust_remote_code"],
        dtype=request.get("dtype", "auto"),
        max_model_len=longest + 8,
        skip_tokenizer_init=True,
        enforce_eager=not _has_gpu(),
    )

    def settings(new_tokens: int, top: int | None = None) -> Any:
        return SamplingParams(temperature=0, max_tokens=new_tokens, logprobs=top, ignore_eos=True, detokenize=False)

    if "ids" in request:
        (found,) = engine.generate([{"prompt_token_ids": request["ids"]}], settings(1, TOP), use_tqdm=False)
        answer = {token: value.logprob for token, value in found.outputs[0].logprobs[0].items()}
    else:
        answer = _speeds(engine, request, settings)
    print(f"{ANSWER}{json.dumps(answer)}", flush=True)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _speeds(engine: Any, request: dict[str, Any], settings: Any) -> dict[str, Any]:
    """Return tokens per second by batch, the seconds to the first token of one sequence, and the bytes of memory."""
    import psutil

    tokens, new_tokens = request["prompt_tokens"], request["new_tokens"]

    def seconds(batch: int, count: int, start: int) -> float:
        prompts = [{"prompt_token_ids": [3 + (start + 7 * i + j) % 997 for j in range(tokens)]} for i in range(batch)]
        began = time.perf_counter()
        engine.generate(prompts, settings(count), use_tqdm=False)
        return time.perf_counter() - began

    seconds(1, 2, 0)  # warm up
    first = [seconds(1, 1, 1 + i) for i in range(ROUNDS)]
    out: dict[str, Any] = {"first_token_seconds": first, "tokens_per_second": {}}
    for batch in request["batches"]:
        # Beginnings differ, so that no prompt is answered from the cache.
        rounds = []
        for i in range(ROUNDS):
            whole, one = seconds(batch, new_tokens, 100 * i + batch), seconds(batch, 1, 100 * i + 50 + batch)
            rounds.append(batch * (new_tokens - 1) / max(whole - one, 1e-9))
        out["tokens_per_second"][str(batch)] = statistics.median(rounds)
    process = psutil.Process()
    out["bytes"] = sum(p.memory_info().rss for p in [process, *process.children(recursive=True)])
    return out


if __name__ == "__main__":
    main()
