"""Measure accuracy on lm-eval's tasks: ``python evaluate/zero_shot.py --models A B --tasks piqa,arc_easy``."""

import sys

from llm_pruner.arguments import ZeroShotArguments
from llm_pruner.cli import evaluate, run

if __name__ == "__main__":
    sys.exit(run(ZeroShotArguments, evaluate))
