"""Run the README's commands, and compare the numbers printed beside them with what they give here.

    python benchmarks/readme.py                 # from the root of a clone; some minutes
    python benchmarks/readme.py --list          # what would be run

Every ``llm-pruner`` and ``make demo`` line of a bash block is run, in order, in one temporary folder; lines with a
comment ``# needs the network`` or that serve a page are not. Then every table of the README whose rows and columns are
all in a table that a command wrote (``table.md``), by name and head, is compared with it: sizes to the digit,
perplexities to 2%, speeds as ratios to the first row, to 15%. The exit code is 1 if a number differs or a command
fails.
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
TOLERANCES = (("tok/s", 0.15), ("ppl", 0.02))  # by a part of the column's head; the rest is exact
PREFIXES = {"k": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}


def commands(readme: str) -> list[str]:
    """Return the commands of the README that can be run without the network."""
    blocks = re.findall(r"```bash\n(.*?)```", readme, re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [
        line.partition("  #")[0].replace("make demo", "llm-pruner demo").strip()
        for line in lines
        if line.startswith(("llm-pruner ", "make demo")) and not any(mark in line for mark in NOT_RUN)
    ]


Rows = dict[str, dict[str, str]]  # cells by the name of their row, then by the head of their column


def tables(markdown: str) -> list[Rows]:
    """Return the rows of every table by their first cell, without the marks of the best numbers."""
    blocks = re.findall(r"((?:^\|.*\n)+)", markdown.replace("**", ""), re.MULTILINE)
    return [_rows_of(*(_cells(line) for line in block.splitlines())) for block in blocks]


def _rows_of(head: list[str], _line: list[str], *body: list[str]) -> Rows:
    return {cells[0]: dict(zip(head[1:], cells[1:], strict=True)) for cells in body}


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().removeprefix("|").removesuffix("|"))]


def number(cell: str) -> float | None:
    """Return the number that a cell begins with, prefix included.

    >>> number("17.8 G"), number("3,420"), number("70.0 ± 1.1"), number("-")
    (17800000000.0, 3420.0, 70.0, None)
    """
    found = re.match(r"([\d,]*\.?\d+)(?: ([kMGBT])\b)?", cell)
    return float(found[1].replace(",", "")) * PREFIXES.get(found[2], 1) if found else None


def differences(stated: Rows, measured: Rows) -> list[str]:
    """Compare two tables; return a line for each cell that differs. Speeds are compared relative to the first row's."""
    lines = []
    for name, cells in stated.items():
        for head, cell in cells.items():
            tolerance = next((value for part, value in TOLERANCES if part in head), 0.0)
            one, two = (_relative(rows, next(iter(stated)), name, head) for rows in (stated, measured))
            if one is not None and (two is None or abs(one - two) > tolerance * abs(one)):
                lines.append(f"{name}, {head}: README {cell}, here {measured[name][head]}")
    return lines


def _relative(rows: Rows, first: str, name: str, head: str) -> float | None:
    """Return the number of a cell, a speed as its ratio to that of the first row."""
    value, base = (number(rows[row][head]) for row in (name, first))
    if "tok/s" not in head or value is None:
        return value
    return value / base if base else None


def is_of(stated: Rows, measured: Rows) -> bool:
    """Return True if a table of the README shows rows and columns of a measured one."""
    return all(name in measured and set(cells) <= set(measured[name]) for name, cells in stated.items())


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
