"""Prune by a preset of llm-pruner, and report the same cost as the scripts of the other tools.

    python run_ours.py --model FOLDER --text C4.jsonl --samples 64 --tokens 128 --method best --target 0.8 \\
        --output FOLDER

The pruning is timed from the loaded model to the model that is saved, the check of mask equivalence included.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from runner import write_cost

import llm_pruner as lp


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "text", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--samples", type=int, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--method", required=True, help="preset: paper, fast or best")
    parser.add_argument("--target", type=float, required=True)
    args = parser.parse_args()
    loading, saving = Stage("load"), Stage("save")

    def observe(stage: str, done: int, total: int) -> None:
        for timed in (loading, saving):
            timed.observe(stage, done)

    lp.prune(
        str(args.model),
        preset=args.method,
        target_params=str(args.target),
        calib_dataset=str(args.text),
        num_examples=args.samples,
        calib_seq_len=args.tokens,
        self_examples=0,
        eval_datasets="",
        output=str(args.output),
        progress=observe,
    )
    write_cost(args.output, saving.begin - loading.end)


class Stage:
    """CPU seconds of the process at which a stage begins and ends."""

    def __init__(self, name: str) -> None:
        self.name, self.begin, self.end = name, 0.0, 0.0

    def observe(self, stage: str, done: int) -> None:
        """Note the time if the stage is this one."""
        if stage == self.name and done:
            self.end = time.process_time()
        elif stage == self.name:
            self.begin = time.process_time()


if __name__ == "__main__":
    main()
