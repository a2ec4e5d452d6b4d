"""Measure accuracy on tasks of lm-eval: ``python evaluate/zero_shot.py --model A B --tasks piqa,arc_easy``."""

import sys

from llm_pruner.cli import run_script

if __name__ == "__main__":
    sys.exit(run_script("evaluate/zero_shot.py"))
