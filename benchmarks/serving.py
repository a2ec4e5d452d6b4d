"""Speed of pruned models in other engines, in turns with the original: tokens per second beside the weights read.

    python benchmarks/serving.py vllm original smaller smaller-uniform --output results/serving_vllm.json
    python benchmarks/serving.py llama.cpp original smaller --output results/serving_llama_cpp.json

``weights`` is the share of the original's weights that each new token reads: all of them, but for an input embedding
that is no head at the same time. A memory-bound engine can be faster by its inverse.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from math import prod
from pathlib import Path

from safetensors import safe_open

from llm_pruner.provenance import provenance
from llm_pruner.serving.engines import NEW_TOKENS, PROMPT_TOKENS, ROUNDS, measure_engines


def weights_read(folder: Path) -> int:
    """Return the weights read for each token, by a folder's files: all but an input embedding that is no head."""
    sizes = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            sizes |= {name: prod(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118 - no dict
    embeddings = [name for name in sizes if "embed" in name and name.endswith(".weight")]
    return sum(sizes.values()) - (sum(sizes[name] for name in embeddings) if "lm_head.weight" in sizes else 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=("vllm", "llama.cpp"))
    parser.add_argument("models", nargs="+", help="folders, the original's first")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--trust_remote_code", action="store_true")
    options = parser.parse_args()
    read = [weights_read(Path(name)) for name in options.models]
    speeds = measure_engines(options.engine, options.models, trust_remote_code=options.trust_remote_code)
    rows = []
    for name, weights, speed in zip(options.models, read, speeds, strict=True):
        ratios = {b: round(v / speeds[0].tokens_per_second[b], 3) for b, v in speed.tokens_per_second.items()}
        rows.append(
            {"model": Path(name).name, "weights": round(weights / read[0], 4), "ratios": ratios, **asdict(speed)}
        )
    record = {"rows": rows, "prompt": PROMPT_TOKENS, "new_tokens": NEW_TOKENS, "rounds": ROUNDS}
    print(json.dumps(record | provenance(), indent=1))
    if options.output:
        options.output.write_text(json.dumps(record | provenance(), indent=1) + "\n")


if __name__ == "__main__":
    main()
