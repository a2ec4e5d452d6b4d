"""Recover a pruned model: LLM-Pruner's command, with its flags. ``python post_training.py --help`` lists them."""

import sys

from llm_pruner.cli import run
from llm_pruner.recovery import RecoverArguments, recover

if __name__ == "__main__":
    sys.exit(run(RecoverArguments, recover))
