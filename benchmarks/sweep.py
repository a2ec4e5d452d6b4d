"""A sweep of 24 points on SmolLM2 against 24 runs of their own, timed side by side.

    python benchmarks/sweep.py --calib_dataset C4.jsonl --dataset WIKITEXT.txt

The runs of their own are processes that load, score, prune and measure, as a shell loop would; every sixth point is
timed so, and the mean taken for all.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CRITERIA = ("l1", "l2", "taylor", "wanda")
AGGREGATIONS = ("sum", "mean", "max")
RATIOS = (0.25, 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calib_dataset", default="python-docs")
    parser.add_argument("--dataset", default="python-docs")
    parser.add_argument("--max_windows", type=int, default=64)
    parser.add_argument("--every", type=int, default=6, help="time every so manyth point on its own")
    args = parser.parse_args()
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
