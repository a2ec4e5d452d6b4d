"""Measure size, compute, memory and speed: ``python evaluate/cost.py --model A B``."""

import sys

from llm_pruner.cli import run_script

if __name__ == "__main__":
    sys.exit(run_script("evaluate/cost.py"))
