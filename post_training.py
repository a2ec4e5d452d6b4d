"""Recover a pruned model: LLM-Pruner's command, with its flags. ``python post_training.py --help`` lists them."""

import sys

from llm_pruner.cli import run_script

if __name__ == "__main__":
    sys.exit(run_script("post_training.py"))
