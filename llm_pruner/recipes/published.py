"""Print the published numbers of LLM-Pruner's tables beside those of a sweep of a recipe ``paper/...``.

    python -m llm_pruner.recipes.published runs/paper/llama7b_20

The sweep's folder is named after the table. Each cell is "measured / published"; accuracies are in percent, acc_norm if
the harness has it, else acc.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..evaluation.tabular import markdown
from .source import LIBRARY

PUBLISHED = LIBRARY / "paper" / "published.json"
TASKS = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
# Costs by their name in the published tables: key of a row, and the unit that the tables count in.
COSTS = {"params_B": ("parameters", 1e9), "macs_G": ("macs", 1e9), "memory_MiB": ("weight bytes", 2**20)}
LATENCY = "latency_s"  # seconds to read WikiText-2
WITHOUT_BOS = " without BOS"  # end of a text's name where windows lack it, as the paper's do
UNMEASURED = ("point", "label")  # what names a published row


def read_measured(row: Mapping[str, Any], name: str) -> float | None:
    """Return a row's number by its name in the paper; the average of tasks only if all of them were measured.

    >>> read_measured({"parameters": 5_422_977_024, "piqa acc": 0.75, "piqa acc_norm": 0.76}, "params_B")
    5.422977024
    """
    if name in COSTS:
        key, unit = COSTS[name]
        return row[key] / unit if key in row else None
    if name == LATENCY:
        return _on_text(row, "seconds wikitext2")
    if name == "average":
        accuracies = [accuracy for task in TASKS if (accuracy := read_measured(row, task)) is not None]
        return sum(accuracies) / len(TASKS) if len(accuracies) == len(TASKS) else None
    if (perplexity := _on_text(row, f"perplexity {name}")) is not None:
        return perplexity
    accuracy = row.get(f"{name} acc_norm", row.get(f"{name} acc"))
    return None if accuracy is None else 100 * float(accuracy)


def _on_text(row: Mapping[str, Any], key: str) -> float | None:
    value = row.get(f"{key}{WITHOUT_BOS}", row.get(key))
    return None if value is None else float(value)


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
    names = [name for name in tables[folder.name][0] if name not in UNMEASURED]
    cells = [["", *names]]
    for row in tables[folder.name]:
        point = row["point"] or {"point": 0}
        measured: dict[str, Any] = next((result for result in results if point.items() <= result.items()), {})
        values = {name: read_measured(measured, name) for name in names}
        varied = [key.rpartition(".")[2] if value is True else str(value) for key, value in row["point"].items()]
        label = row.get("label") or ", ".join(varied) or "unpruned"
        cells.append([label, *(_cell(values[name], row.get(name)) for name in names)])
    return cells


def _cell(measured: float | None, published: float | None) -> str:
    """Return "measured / published", a dash for a number that is missing.

    >>> _cell(12852.5078125, 12884.5), _cell(78.0, None)
    ('12852.51 / 12884.5', '78 / -')
    """
    known = "-" if measured is None else f"{round(measured, 2):.12g}"
    return f"{known} / {'-' if published is None else published}"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m llm_pruner.recipes.published FOLDER")
    print(markdown(compare(Path(sys.argv[1]))), end="")
