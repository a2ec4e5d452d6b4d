"""Time and memory of the engine on one GPU, on a random model of LLaMA-7B's shapes in bfloat16.

    python benchmarks/gpu.py [--layers 32] [--output results/gpu.json]

Scoring is timed in turn with a plain forward and backward pass over the same batch; memory is the most that CUDA's
allocator held, as a multiple of the weights. Half of the heads and neurons of the middle layers are then cut out and
the speed of both models is measured in turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import llm_pruner as lp
from llm_pruner.evaluation.speed import speeds
from llm_pruner.importance.taylor import VARIANTS
from llm_pruner.models.skeleton import parameter_count
from llm_pruner.provenance import provenance

KINDS = ("heads", "neurons")
SAMPLES, TOKENS, REFIT_SAMPLES, REFIT_TOKENS, RATIO = 10, 64, 128, 128, 0.5


def seconds(work: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def peak_ratio(work: Callable[[], Any], weights: int) -> float:
    """Return the allocator's peak during ``work`` as a multiple of the weights."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    work()
    return round(torch.cuda.max_memory_allocated() / weights, 3)


def measure_scoring(model: LlamaForCausalLM, graph: lp.CouplingGraph, ids: torch.Tensor, pairs: int) -> dict[str, Any]:
    weights = sum(p.nbytes for p in model.parameters())

    def score(taylor: str = "param_first") -> lp.Scores:
        return lp.score(model, graph, ids, taylor=taylor, kinds=KINDS)

    def plain() -> None:
        model.requires_grad_(True)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)

    score(), plain()  # warm up
    rows = [(seconds(score), seconds(plain)) for _ in range(pairs)]
    peaks = {"plain": peak_ratio(plain, weights)}
    peaks |= {taylor: peak_ratio(lambda taylor=taylor: score(taylor), weights) for taylor in VARIANTS}
    return {
        "score_seconds": round(statistics.median(a for a, _ in rows), 3),
        "plain_step_seconds": round(statistics.median(b for _, b in rows), 3),
        "score_to_plain": [round(a / b, 3) for a, b in rows],
        "peak_to_weights": peaks,
    }


def measure_pruning(model: LlamaForCausalLM, graph: lp.CouplingGraph, ids: torch.Tensor) -> dict[str, Any]:
    out: dict[str, Any] = {}
    layers = range(model.config.num_hidden_layers // 8, model.config.num_hidden_layers * 7 // 8)
    scores = lp.score(model, graph, ids, kinds=KINDS)
    started = time.perf_counter()
    plan = lp.select(graph, scores, ratio=RATIO, kinds=KINDS, layers=layers)
    pruned = lp.apply(model, plan)
    out["select_apply_seconds"] = round(time.perf_counter() - started, 3)
    out["parameters_ratio"] = round(parameter_count(pruned) / parameter_count(model), 4)
    out["speed_ratio"] = {}
    for tokens, batch in ((128, 1), (2048, 1), (128, 16)):
        _, after = speeds((model, pruned), tokens, batch)
        ratios = {f"prefill, {batch} x {tokens}": after.prefill_ratio, f"decode, batch {batch}": after.decode_ratio}
        out["speed_ratio"] |= {name: round(ratio.median, 3) for name, ratio in ratios.items() if ratio}
    calibration = torch.randint(0, model.config.vocab_size, (REFIT_SAMPLES, REFIT_TOKENS), device=ids.device)
    out["refit_seconds"] = round(seconds(lambda: lp.compensate(model, pruned, calibration)), 1)
    out["refit_tokens"] = calibration.numel()
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=args.layers, dtype=torch.bfloat16)).to(torch.bfloat16)
    model.eval()
    ids = torch.randint(0, model.config.vocab_size, (SAMPLES, TOKENS), device="cuda")
    results: dict[str, Any] = {
        "machine": torch.cuda.get_device_name(),
        "model": f"LLaMA-7B's shapes, {args.layers} layers, random bfloat16 weights",
        "parameters": parameter_count(model),
        "calibration": f"{SAMPLES} x {TOKENS} tokens",
    }
    started = time.perf_counter()
    graph = lp.trace(model)
    results["trace_seconds"] = round(time.perf_counter() - started, 3)
    results |= measure_scoring(model, graph, ids, args.pairs)
    results |= measure_pruning(model, graph, ids)
    results |= provenance()
    print(json.dumps(results, indent=1))
    if args.output:
        args.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
