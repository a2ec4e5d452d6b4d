"""Measure perplexity: ``python evaluate/perplexity.py --model M --dataset wikitext2``."""

import sys

from llm_pruner.arguments import PerplexityArguments
from llm_pruner.cli import evaluate_perplexity, run

if __name__ == "__main__":
    sys.exit(run(PerplexityArguments, evaluate_perplexity))
