"""Try models in the browser: LLM-Pruner's command, with its flags. ``python generate.py --help`` lists them."""

import sys

from llm_pruner.cli import run_script

if __name__ == "__main__":
    sys.exit(run_script("generate.py"))
