"""CPU seconds of commands that only print: they must load neither torch nor transformers.

Each command runs once to warm up and then REPEATS times; the median of user and system time of the process is printed
as JSON, beside that of ``python -c pass`` and of ``python -c "import llm_pruner"``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

REPEATS = 9
COMMANDS = {
    "python": ["-c", "pass"],
    "import llm_pruner": ["-c", "import llm_pruner"],
    "--version": ["-m", "llm_pruner", "--version"],
    "--help": ["-m", "llm_pruner", "--help"],
    "prune --help": ["-m", "llm_pruner", "prune", "--help"],
    "recover --help": ["-m", "llm_pruner", "recover", "--help"],
}
LIMITS = {"--version": 0.3, "--help": 0.3, "prune --help": 0.5}  # seconds


def cpu_seconds(argv: list[str]) -> float:
    """Run a Python command; return its user and system seconds."""
    before = os.times()
    subprocess.run([sys.executable, *argv], check=True, stdout=subprocess.DEVNULL)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", help="JSON file to write as well")
    arguments = parser.parse_args()
    rows = {}
    for name, argv in COMMANDS.items():
        cpu_seconds(argv)
        rows[name] = round(statistics.median(cpu_seconds(argv) for _ in range(REPEATS)), 3)
    document = json.dumps({"cpu_seconds": rows, "limits": LIMITS}, indent=1) + "\n"
    print(document, end="")
    if arguments.output:
        Path(arguments.output).write_text(document, encoding="utf-8")
    slow = [name for name, limit in LIMITS.items() if rows[name] > limit]
    if slow:
        sys.exit(f"slower than the limit: {', '.join(slow)}")


if __name__ == "__main__":
    main()
