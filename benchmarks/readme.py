"""Run the README's commands, and compare the numbers printed beside them with what they give here.

    python benchmarks/readme.py                 # from the root of a clone; some minutes
    python benchmarks/readme.py --list          # what would be run

Every ``llm-pruner`` and ``make demo`` line of a bash block is run, in order, in one temporary folder; lines with a
comment ``# needs the network`` or that serve a page are not. Then every table of the README whose rows are all in a
table that a command wrote (``table.md``), for as many models, is compared with it: sizes to the digit, perplexities to
2%, speeds as ratios to the first column, to 15%. The exit code is 1 if a number differs or a command fails.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NOT_RUN = ("llm-pruner chat", "# needs the network")
TOLERANCES = (("tokens/s", 0.15), ("perplexity", 0.02))  # the rest is exact


def commands(readme: str) -> list[str]:
    """Return the commands of the README that can be run without the network."""
    blocks = re.findall(r"```bash\n(.*?)```", readme, re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [
        line.partition("  #")[0].replace("make demo", "llm-pruner demo").strip()
        for line in lines
        if line.startswith(("llm-pruner ", "make demo")) and not any(mark in line for mark in NOT_RUN)
    ]


def tables(markdown: str) -> list[dict[str, list[str]]]:
    """Return the cells of every row of every table, by the row's first cell."""
    found = re.findall(r"((?:^\|.*\n)+)", markdown, re.MULTILINE)
    return [
        {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in map(_cells, lines.splitlines()[2:])}
        for lines in found
    ]


def _cells(line: str) -> list[str]:
    return re.split(r"(?<!\\)\|", line.strip().strip("|"))


def number(cell: str, ratio: bool) -> float | None:
    """Return the number in a cell, or the ratio in its parentheses."""
    found = re.search(r"\((\d[\d.]*)" if ratio else r"^([\d,.]+)", cell)
    return float(found[1].replace(",", "")) if found else None


def differences(stated: dict[str, list[str]], measured: dict[str, list[str]]) -> list[str]:
    """Compare two tables; return a line for each cell that differs."""
    lines = []
    for name, cells in stated.items():
        tolerance = next((value for part, value in TOLERANCES if part in name), 0.0)
        for said, here in zip(cells, measured[name], strict=True):
            one, two = (number(cell, ratio="tokens/s" in name) for cell in (said, here))
            if one is not None and (two is None or abs(one - two) > tolerance * abs(one)):
                lines.append(f"{name}: README {said}, here {here}")
    return lines


def is_of(stated: dict[str, list[str]], measured: dict[str, list[str]]) -> bool:
    """Return True if a table of the README shows rows of a measured one, for as many models."""
    return all(name in measured and len(measured[name]) == len(cells) for name, cells in stated.items())


def run(command: str, folder: str) -> bool:
    print(f"$ {command}", flush=True)
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(shlex.split(command), cwd=folder, env=env, check=False).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="only print the commands")
    options = parser.parse_args()
    readme = (ROOT / "README.md").read_text()
    if options.list:
        print("\n".join(commands(readme)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        problems = [f"failed: {command}" for command in commands(readme) if not run(command, folder)]
        written = [table for file in Path(folder).rglob("table.md") for table in tables(file.read_text())]
    compared = [(stated, measured) for stated in tables(readme) for measured in written if is_of(stated, measured)]
    problems += [line for pair in compared for line in differences(*pair)]
    if len(compared) < len(written):
        problems.append(f"{len(written)} tables were written, and the README shows {len(compared)} of them")
    print("\n".join(problems) or "every number of the README's tables was found again")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
