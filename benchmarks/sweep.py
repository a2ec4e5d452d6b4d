"""A sweep of 24 points on SmolLM2 against 24 runs of their own, timed side by side; or the dry run of a sweep of 96.

    python benchmarks/sweep.py --calib_dataset C4.jsonl --dataset WIKITEXT.txt
    python benchmarks/sweep.py --dry_run --output benchmarks/results/sweep_dry_run.json

The runs of their own are processes that load, score, prune and measure, as a shell loop would; every sixth point is
timed so, and the mean taken for all. The dry run predicts 4 criteria x 6 aggregations x 4 ratios; its process is timed
as a whole, and the load of the machine before it is recorded beside its seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CRITERIA = ("l1", "l2", "taylor", "wanda")
AGGREGATIONS = ("sum", "mean", "max")
RATIOS = (0.25, 0.5)
DRY_AGGREGATIONS = ("sum", "mean", "max", "prod", "first", "last")
DRY_RATIOS = (0.1, 0.2, 0.3, 0.5)
DRY_LIMIT = 30.0  # CPU seconds, which are those of the clock where the machine is free


def time_dry_run(output: str | None) -> None:
    """Time the dry run of 96 points; stop with an error if it takes longer than the limit."""
    grid = {
        "prune.pruner_type": list(CRITERIA),
        "prune.grouping_strategy": list(DRY_AGGREGATIONS),
        "prune.pruning_ratio": list(DRY_RATIOS),
    }
    with tempfile.TemporaryDirectory() as folder:
        recipe = {
            "model": "smollm2-135m",
            "output": f"{folder}/out",
            "stages": [{"prune": {}}],
            "sweep": {"grid": grid},
        }
        path = Path(folder) / "sweep.yaml"
        path.write_text(json.dumps(recipe))  # JSON is YAML
        load, start, before = os.getloadavg()[0], time.perf_counter(), os.times()
        argv = [sys.executable, "-m", "llm_pruner", "run", str(path), "--dry_run"]
        subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
        seconds, after = time.perf_counter() - start, os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    record = {
        "points": len(CRITERIA) * len(DRY_AGGREGATIONS) * len(DRY_RATIOS),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu, 1),
        "cpu_limit": DRY_LIMIT,
        "load_before": round(load, 2),
    }
    document = json.dumps(record, indent=1) + "\n"
    print(document, end="")
    if output:
        Path(output).write_text(document, encoding="utf-8")
    if cpu > DRY_LIMIT:
        sys.exit(f"the dry run took {cpu:.1f} CPU seconds, the limit is {DRY_LIMIT:.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calib_dataset", default="python-docs")
    parser.add_argument("--dataset", default="python-docs")
    parser.add_argument("--max_windows", type=int, default=64)
    parser.add_argument("--every", type=int, default=6, help="time every so manyth point on its own")
    parser.add_argument("--dry_run", action="store_true", help="time the dry run of 96 points instead")
    parser.add_argument("--output", help="JSON file to write the times of the dry run to as well")
    args = parser.parse_args()
    if args.dry_run:
        time_dry_run(args.output)
        return
    common = {"preset": "paper", "calib_dataset": args.calib_dataset, "num_examples": 32, "calib_seq_len": 128}
    points = [(c, a, r) for c in CRITERIA for a in AGGREGATIONS for r in RATIOS]
    with tempfile.TemporaryDirectory() as folder:
        recipe = {
            "model": "smollm2-135m",
            "output": f"{folder}/out",
            "evaluate": {"datasets": args.dataset, "max_windows": args.max_windows},
            "stages": [{"prune": common}],
            "sweep": {
                "grid": {
                    "prune.pruner_type": list(CRITERIA),
                    "prune.grouping_strategy": list(AGGREGATIONS),
                    "prune.pruning_ratio": list(RATIOS),
                }
            },
        }
        path = Path(folder) / "sweep.yaml"
        path.write_text(json.dumps(recipe))  # JSON is YAML
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "llm_pruner", "run", str(path)], check=True)
        together = time.perf_counter() - start
        alone = []
        for criterion, aggregation, ratio in points[:: args.every]:
            flags = [f for name, value in common.items() for f in (f"--{name}", str(value))]
            flags += ["--pruner_type", criterion, "--grouping_strategy", aggregation, "--pruning_ratio", str(ratio)]
            flags += ["--eval_datasets", args.dataset, "--max_windows", str(args.max_windows), "--save_model"]
            start = time.perf_counter()
            subprocess.run([sys.executable, "-m", "llm_pruner", "prune", *flags, "--output_root", folder], check=True)
            alone.append(time.perf_counter() - start)
        mean = sum(alone) / len(alone)
        print(f"24 points together: {together:.0f} s; alone: {mean:.1f} s each, {24 * mean:.0f} s for 24")
        print(f"ratio {together / (24 * mean):.3f}")


if __name__ == "__main__":
    main()
