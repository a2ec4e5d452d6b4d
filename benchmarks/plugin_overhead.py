"""Overhead of the vLLM plugin on an unpruned model, through the same backend: decoding with and without it, in turns.

    python benchmarks/plugin_overhead.py MODEL --output results/plugin_overhead.json

MODEL is a folder. A copy whose config names ``TransformersForCausalLM`` runs in vLLM's transformers backend twice: once
as installed, once with ``VLLM_PLUGINS`` empty.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path

from llm_pruner.provenance import provenance
from llm_pruner.serving.engines import running
from llm_pruner.turns import relative_spread

PROMPT, NEW_TOKENS, ROUNDS = 32, 64, 9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        copy = Path(shutil.copytree(options.model, Path(folder) / "copy"))
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(config | {"architectures": ["TransformersForCausalLM"]}))
        engines = []
        for plugins in (None, ""):
            os.environ.pop("VLLM_PLUGINS", None)
            if plugins is not None:
                os.environ["VLLM_PLUGINS"] = plugins
            engines.append(stack.enter_context(running("vllm", copy, tokens=PROMPT + NEW_TOKENS + 16)))
        seconds: list[list[float]] = [[], []]
        for number in range(-1, ROUNDS):
            for at, engine in enumerate(engines):
                taken = engine.ask(batch=1, prompt=PROMPT, new_tokens=NEW_TOKENS, seed=number + 1)
                if number >= 0:
                    seconds[at].append(taken)
    ratios = [with_plugin / without for with_plugin, without in zip(*seconds, strict=True)]
    record = {
        "model": options.model.name,
        "seconds_with": round(statistics.median(seconds[0]), 4),
        "seconds_without": round(statistics.median(seconds[1]), 4),
        "ratio": round(statistics.median(ratios), 4),
        "spread": round(relative_spread(ratios), 4),
        "new_tokens": NEW_TOKENS,
        "rounds": ROUNDS,
    }
    print(json.dumps(record | provenance(), indent=1))
    if options.output:
        options.output.write_text(json.dumps(record | provenance(), indent=1) + "\n")


if __name__ == "__main__":
    main()
