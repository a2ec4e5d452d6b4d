"""Speed of pruned models in other engines, in turns with the original: tokens per second beside the weights read.

    python benchmarks/serving.py vllm smollm2-135m smaller smaller-uniform --output results/serving_vllm.json
    python benchmarks/serving.py llama.cpp smollm2-135m smaller --output results/serving_llama_cpp.json

``weights`` is the share of the original's weights that each new token reads: all of them, but for an input embedding
that is no head at the same time. A memory-bound engine can be faster by its inverse.
"""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import asdict
from pathlib import Path

import torch

import llm_pruner as lp
from llm_pruner.models.inputs import input_embedding
from llm_pruner.provenance import provenance
from llm_pruner.serving.engines import NEW_TOKENS, PROMPT_TOKENS, ROUNDS, measure_engines


def weights_read(name: str) -> int:
    """Return the weights that a model reads for each token."""
    model, _ = lp.load(name)
    head, embedding = model.get_output_embeddings(), input_embedding(model)
    total = sum(p.numel() for p in model.parameters())
    tied = head is None or embedding is None or head.weight is embedding.weight
    return total if tied else total - embedding.weight.numel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=("vllm", "llama.cpp"))
    parser.add_argument("models", nargs="+", help="the original first")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    read = [weights_read(name) for name in options.models]
    speeds = measure_engines(options.engine, options.models)
    rows = []
    for name, weights, speed in zip(options.models, read, speeds, strict=True):
        ratios = {b: round(v / speeds[0].tokens_per_second[b], 3) for b, v in speed.tokens_per_second.items()}
        rows.append(
            {"model": Path(name).name, "weights": round(weights / read[0], 4), "ratios": ratios, **asdict(speed)}
        )
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()}, CPU"
    record = {"rows": rows, "prompt": PROMPT_TOKENS, "new_tokens": NEW_TOKENS, "rounds": ROUNDS, "machine": machine}
    print(json.dumps(record | provenance(), indent=1))
    if options.output:
        options.output.write_text(json.dumps(record | provenance(), indent=1) + "\n")


if __name__ == "__main__":
    main()
