"""Print the published numbers of LLM-Pruner's tables beside those of a sweep of a recipe ``paper/...``.

    python -m llm_pruner.recipes.published runs/paper/llama7b_20

The sweep's folder is named after the table. Each cell is "measured / published"; accuracies are in percent, acc_norm if
the harness has it, else acc.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from ..evaluation.tabular import markdown
from .source import LIBRARY

PUBLISHED = LIBRARY / "paper" / "published.json"


def read_measured(row: dict[str, Any], name: str) -> float | None:
    """Return a row's number by its name in the paper."""
    for text in (f"{name} without BOS", name):  # the paper's windows lack it
        if (perplexity := row.get(f"perplexity {text}")) is not None:
            return float(perplexity)
    accuracy = row.get(f"{name} acc_norm", row.get(f"{name} acc"))
    return None if accuracy is None else 100 * accuracy


def compare(folder: Path) -> list[list[str]]:
    """Return the rows of the published table with the measured numbers, head first.

    Raises:
        SystemExit: the folder holds no sweep, or its table is not in the published ones.
    """
    published = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    tables = {name: rows for name, rows in published.items() if isinstance(rows, list)}
    if folder.name not in tables:
        raise SystemExit(f"{PUBLISHED.name} has no table {folder.name!r}; it has {', '.join(tables)}")
    try:
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SystemExit(f"no sweep was run in {folder}: {error}") from error
    names = [name for name in tables[folder.name][0] if name != "point"]
    cells = [["", *names]]
    for row in tables[folder.name]:
        point = row["point"] or {"point": 0}
        measured: dict[str, Any] = next((result for result in results if point.items() <= result.items()), {})
        values = {name: read_measured(measured, name) for name in names}
        label = ", ".join(map(str, row["point"].values())) or "unpruned"
        cells.append([label, *(f"{'-' if v is None else f'{v:.4g}'} / {row[name]}" for name, v in values.items())])
    return cells


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m llm_pruner.recipes.published FOLDER")
    print(markdown(compare(Path(sys.argv[1]))), end="")
