"""Prune a model: LLM-Pruner's command, with its flags. ``python hf_prune.py --help`` lists them."""

import sys

from llm_pruner.arguments import PruneArguments
from llm_pruner.cli import prune, run

if __name__ == "__main__":
    sys.exit(run(PruneArguments, prune))
