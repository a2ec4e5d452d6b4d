"""Prune a model: LLM-Pruner's command, with its flags. ``python hf_prune.py --help`` lists them."""

import sys

from llm_pruner.cli import run_script

if __name__ == "__main__":
    sys.exit(run_script("hf_prune.py"))
