"""The published numbers of LLM-Pruner's tables beside those of a sweep of this folder.

    python recipes/paper/beside.py runs/paper/llama7b_20

The table is the one that the sweep's folder is named after. Each cell is "measured / published"; of accuracies, in
percent, acc_norm where the harness has it, else acc.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from llm_pruner.evaluation.table import markdown

PUBLISHED = Path(__file__).with_name("published.json")


def measured(row: dict[str, Any], name: str) -> float | None:
    """A row's number by the paper's name of it."""
    if (perplexity := row.get(f"perplexity {name}")) is not None:
        return perplexity
    accuracy = row.get(f"{name} acc_norm", row.get(f"{name} acc"))
    return None if accuracy is None else 100 * accuracy


def table(folder: Path) -> list[list[str]]:
    """Rows of the published table, head first.

    Raises:
        SystemExit: the folder holds no sweep, or nothing is published of it.
    """
    published = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    rows = published.get(folder.name)
    if not isinstance(rows, list):
        known = ", ".join(name for name, value in published.items() if isinstance(value, list))
        raise SystemExit(f"{PUBLISHED.name} has no table {folder.name!r}; it has {known}")
    try:
        found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SystemExit(f"no sweep was run in {folder}: {error}") from error
    names = [name for name in rows[0] if name != "point"]
    out = [["", *names]]
    for row in rows:
        point = row["point"] or {"point": 0}
        ours: dict[str, Any] = next((r for r in found if point.items() <= r.items()), {})
        values = [measured(ours, name) for name in names]
        cells = [f"{'-' if v is None else f'{v:.4g}'} / {row[n]}" for v, n in zip(values, names, strict=True)]
        out.append([", ".join(map(str, row["point"].values())) or "unpruned", *cells])
    return out


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(f"usage: python {sys.argv[0]} FOLDER")
    print(markdown(table(Path(sys.argv[1]))), end="")
