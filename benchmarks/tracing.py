"""Seconds and memory of discovery: does trace time grow with the layers and no faster, and do large models fit?

Everything is traced on the meta device from a config, each model in a process of its own, so that the memory is the
model's. Settings: Llama shapes of 8 to 128 layers (Llama-7B's widths), and DeepSeek-V3's (671B, 61 layers of 256
experts). ``building`` is the time that transformers takes to make the meta model. ``tiny`` is trace plus permutation
test of every unit, on a real tiny Llama.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

LAYERS = (8, 16, 32, 64, 128)


def measure(model_type: str, fields: dict[str, Any]) -> dict[str, Any]:
    from transformers import AutoConfig

    import llm_pruner as lp
    from llm_pruner.checkpoint.config import meta_model

    lp.trace(meta_model(AutoConfig.for_model("llama", num_hidden_layers=1)))  # imports and caches
    before = peak()
    start = time.perf_counter()
    model = meta_model(AutoConfig.for_model(model_type, **fields))
    built = time.perf_counter()
    graph = lp.trace(model)
    done = time.perf_counter()
    return {
        "model": model_type,
        "layers": model.config.num_hidden_layers,
        "parameters": sum(p.numel() for p in model.parameters()),
        "units": len(graph.units),
        "building_seconds": round(built - start, 2),
        "trace_seconds": round(done - built, 2),
        "MiB": round((peak() - before) / 1024),
    }


def tiny() -> dict[str, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM

    import llm_pruner as lp
    from llm_pruner.graph.permutation import verify_units

    fields = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("llama", num_attention_heads=4, num_key_value_heads=2, **fields)
    )
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        verify_units(model, lp.trace(model))
        seconds.append(time.perf_counter() - start)
    return {"model": "tiny llama, trace and permutation test", "seconds": round(sorted(seconds)[2], 3)}


def peak() -> int:
    """Peak resident memory so far, in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        request = json.loads(args.one)
        print(json.dumps(tiny() if request is None else measure(*request)))
        return
    requests: list[Any] = [None, *(["llama", {"num_hidden_layers": n}] for n in LAYERS), ["deepseek_v3", {}]]
    rows = []
    for request in requests:
        out = subprocess.run([sys.executable, __file__, "--one", json.dumps(request)], capture_output=True, check=True)
        rows.append(json.loads(out.stdout.splitlines()[-1]))
        print(json.dumps(rows[-1]), flush=True)
    if args.output:
        document = {
            "machine": platform.processor() or platform.machine(),
            "python": sys.version.split()[0],
            "rows": rows,
        }
        args.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
