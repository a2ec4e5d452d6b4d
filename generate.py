"""Try models in the browser: LLM-Pruner's command, with its flags. ``python generate.py --help`` lists them."""

import sys

from llm_pruner.arguments import GenerateArguments
from llm_pruner.chat import chat
from llm_pruner.cli import run

if __name__ == "__main__":
    sys.exit(run(GenerateArguments, chat))
