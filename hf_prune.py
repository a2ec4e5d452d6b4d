"""Prune a model: LLM-Pruner's command, with its flags. ``python hf_prune.py --help`` lists them."""

import sys

from llm_pruner.cli import run
from llm_pruner.pruning import PruneArguments, prune

if __name__ == "__main__":
    sys.exit(run(PruneArguments, prune))
