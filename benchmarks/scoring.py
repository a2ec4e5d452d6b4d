"""Time and memory of the engine on the embedded model, against a plain training step in the same run.

    python benchmarks/scoring.py [--calibration FILE] [--output FILE.json]

Fresh processes, so that their peaks are their own: one loads, traces, scores, selects and applies once and
reports its peak memory (two more do so for the second-order variants); another times Taylor scoring and a plain
forward and backward pass in turn, and reports the medians and the ratio pair by pair; a third times criteria of experts
and plain forward passes of a random mixture with the embedded model's widths in turn.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from transformers import MixtralConfig, MixtralForCausalLM

import llm_pruner as lp
from llm_pruner.data import calibration
from llm_pruner.importance.activation import SAMPLES_PER_PASS

KINDS = ("heads", "neurons")
SAMPLES, TOKENS, RATIO = 10, 64, 0.34
LAYERS_OF_EXPERTS = 4


def peak_gib() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)


def memory(text: str, taylor: str) -> dict:
    out: dict = {"peak_gib": {"imports": peak_gib()}, "seconds": {}}
    clock = time.perf_counter()

    def done(stage: str) -> None:
        nonlocal clock
        out["seconds"][stage] = round(time.perf_counter() - clock, 3)
        out["peak_gib"][stage] = peak_gib()
        clock = time.perf_counter()

    model, tokenizer = lp.load("smollm2-135m")
    done("load")
    ids = calibration(text, tokenizer, SAMPLES, TOKENS)
    done("calibration")
    graph = lp.trace(model)
    done("trace")
    scores = lp.score(model, graph, ids, taylor=taylor, kinds=KINDS)
    done("score")
    plan = lp.select(graph, scores, RATIO, KINDS, layers=range(4, 28))
    done("select")
    lp.apply(model, plan)
    done("apply")
    return out


def in_turn(score: Callable[[], object], plain: Callable[[], object], pairs: int) -> dict:
    """Time two calls in turn; return the ratio of their seconds, pair by pair, and the medians."""

    def seconds(call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    score(), plain()  # warm up
    rows = [(seconds(score), seconds(plain)) for _ in range(pairs)]
    ratios = [a / b for a, b in rows]
    measures = {"min": min, "median": statistics.median, "max": max}
    return {
        "score_seconds": round(statistics.median(a for a, _ in rows), 3),
        "plain_seconds": round(statistics.median(b for _, b in rows), 3),
        "ratio": {name: round(measure(ratios), 3) for name, measure in measures.items()},
        "pairs": pairs,
    }


def experts(text: str, pairs: int) -> dict:
    dense, tokenizer = lp.load("smollm2-135m")
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    widths = {name: getattr(dense.config, name) for name in names}
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**widths, num_hidden_layers=LAYERS_OF_EXPERTS)).eval()
    ids = calibration(text, tokenizer, SAMPLES, TOKENS)
    graph = lp.trace(model)

    @torch.no_grad()
    def plain() -> None:
        for batch in ids.split(SAMPLES_PER_PASS):
            model(input_ids=batch, use_cache=False)

    return {
        criterion: in_turn(partial(lp.score, model, graph, ids, criterion, kinds=["experts"]), plain, pairs)
        for criterion in ("reap", "frequency", "mone")
    }


def timing(text: str, pairs: int) -> dict:
    model, tokenizer = lp.load("smollm2-135m")
    ids = calibration(text, tokenizer, SAMPLES, TOKENS)
    graph = lp.trace(model)
    for parameter in model.parameters():
        parameter.requires_grad_(True)

    def plain() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)

    return in_turn(lambda: lp.score(model, graph, ids, kinds=KINDS), plain, pairs)


TIMED = {"timing": timing, "experts": experts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", default="python-docs")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--part", choices=("memory", *TIMED))
    parser.add_argument("--taylor", default="param_first")
    args = parser.parse_args()
    if args.part:
        timed = TIMED.get(args.part)
        print(json.dumps(timed(args.calibration, args.pairs) if timed else memory(args.calibration, args.taylor)))
        return
    results: dict = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "model": "smollm2-135m, float32",
        "calibration": f"{SAMPLES} x {TOKENS} tokens",
    }

    def part(name: str, *flags: str) -> dict:
        command = [sys.executable, __file__, "--part", name, "--calibration", args.calibration, *flags]
        done = subprocess.run(
            [*command, "--pairs", str(args.pairs)], check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        return json.loads(done.stdout)

    results |= part("memory") | part("timing") | {"experts": part("experts")}
    for taylor in ("param_second", "param_mix"):
        results[f"{taylor}_peak_gib"] = part("memory", "--taylor", taylor)["peak_gib"]["score"]
    seconds = results["seconds"]
    results["trace_select_apply_seconds"] = round(seconds["trace"] + seconds["select"] + seconds["apply"], 3)
    print(json.dumps(results, indent=1))
    if args.output:
        args.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
