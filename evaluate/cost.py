"""Measure size, compute, memory and speed: ``python evaluate/cost.py --models A B``."""

import sys

from llm_pruner.arguments import CostArguments
from llm_pruner.cli import evaluate, run

if __name__ == "__main__":
    sys.exit(run(CostArguments, evaluate))
