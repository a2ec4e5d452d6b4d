"""Set up an environment for each of the other tools; one that exists is kept.

    python benchmarks/peers/environments.py FOLDER

LLM-Pruner has no package: clone https://github.com/horseee/LLM-Pruner beside the environments. Only its modules that
prune are imported, so what its evaluation needs is not installed.
"""

from __future__ import annotations

import argparse
import subprocess
import venv
from pathlib import Path

TORCH = "torch==2.13.0"
REQUIREMENTS = {
    "llmpruner": [TORCH, "transformers==4.46.3", "numpy", "sentencepiece", "protobuf"],
    "optipfair": [TORCH, "optipfair==0.4.2", "transformers==5.23.0"],
    "torch_pruning": [TORCH, "torch-pruning==1.6.1", "transformers==4.46.3"],
}


def python_of(environments: Path, tool: str) -> Path:
    """Return the interpreter of a tool's environment."""
    return environments / tool / "bin" / "python"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    for tool, requirements in REQUIREMENTS.items():
        if not python_of(folder, tool).exists():
            venv.create(folder / tool, with_pip=True)
        command = [python_of(folder, tool), "-m", "pip", "install", "--quiet", "--no-compile", *requirements]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
