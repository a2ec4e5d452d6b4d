"""Measure perplexity: ``python evaluate/perplexity.py --model M --dataset wikitext2``."""

import sys

from llm_pruner.cli import run_script

if __name__ == "__main__":
    sys.exit(run_script("evaluate/perplexity.py"))
