"""Quality against bytes: pruning, quantization, and both, of one model.

    pip install torchao
    python benchmarks/quantization.py smollm2-135m smaller --texts wikitext2_test.txt alpaca.jsonl --output FILE.json

Linear layers of the decoder are quantized by torchao, weights only, symmetric in groups of 32 that share a 16-bit
scale; the other weights count 2 bytes each. The texts are measured in windows of 128 tokens. No speed is measured: a
fast kernel for such weights is another engine's.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

import llm_pruner as lp
from llm_pruner.data import text
from llm_pruner.evaluation.perplexity import perplexity, windows
from llm_pruner.evaluation.tabular import markdown
from llm_pruner.provenance import provenance

GROUP, TOKENS = 32, 128
BITS = (16, 8, 4, 3)
RESULTS = Path(__file__).parent / "results" / "quantization.json"


def quantized(name: str, bits: int) -> tuple[nn.Module, Any, float]:
    """Return a model with quantized layers, its tokenizer, and its bytes."""
    model, tokenizer = lp.load(name, "float32", "cpu")
    layers = {
        path: module for path, module in model.named_modules() if isinstance(module, nn.Linear) and ".layers." in path
    }
    weights = sum(module.weight.numel() for module in layers.values())
    others = sum(parameter.numel() for parameter in model.parameters()) - weights
    if bits == 16:
        return model, tokenizer, 2.0 * (weights + others)
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_  # only to measure

    config = IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), granularity=PerGroup(GROUP))
    quantize_(model, config, filter_fn=lambda module, path: path in layers)
    return model, tokenizer, weights * (bits / 8 + 2 / GROUP) + 2.0 * others


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="the original first")
    parser.add_argument("--texts", nargs="+", help="files of texts to measure")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--print", action="store_true", help="print the table of the results")
    options = parser.parse_args()
    if options.print:
        print(table(json.loads(options.output.read_text())["rows"]))
        return
    rows = []
    for name in options.models:
        for bits in BITS:
            model, tokenizer, size = quantized(name, bits)
            row = {"model": Path(name).name, "bits": bits, "mib": round(size / 2**20, 1)}
            for file in options.texts:
                ids = windows(tokenizer, text(file, "test"), TOKENS, options.windows)
                row[Path(file).stem] = round(perplexity(model, ids).perplexity, 2)
            rows.append(row)
            print(row, flush=True)
    made = provenance()
    record = {"rows": rows, "machine": made["machine"], "versions": made["versions"]}
    options.output.write_text(json.dumps(record, indent=1) + "\n")
    print(table(rows))


def table(rows: list[dict[str, Any]]) -> str:
    """Return the table of docs/results.md, smallest last."""
    ordered = sorted(rows, key=lambda row: -row["mib"])
    texts = list(rows[0])[3:]
    cells = [["model", "bits", "MiB", *texts]]
    return markdown(cells + [[row["model"], *(str(row[key]) for key in ("bits", "mib", *texts))] for row in ordered])


if __name__ == "__main__":
    main()
