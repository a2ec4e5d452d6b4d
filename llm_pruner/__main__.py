"""``python -m llm_pruner``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
