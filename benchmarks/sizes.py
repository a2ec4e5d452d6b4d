"""Tables and figure of sizes.yaml and three further recipes: perplexity of SmolLM2-135M at five sizes by ten methods.

    for recipe in sizes half depths shallower; do llm-pruner run benchmarks/$recipe.yaml; done
    python benchmarks/sizes.py --runs runs --figure docs/figures/sizes.svg
    python benchmarks/sizes.py --print

The first line runs in a folder with the texts that the recipes name. The second keeps what the sweeps measured in
results/sizes.json and draws it, and the last prints the tables of docs/results.md.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any

from llm_pruner.evaluation.tabular import markdown
from llm_pruner.provenance import provenance
from llm_pruner.report.runs import MeasuredModel
from llm_pruner.report.tradeoffs import draw_tradeoffs

RESULTS = Path(__file__).parent / "results" / "sizes.json"
SIZES = ("0.9", "0.8", "0.7", "0.6", "0.5")
LAYERS = dict(zip(("26", "22", "19", "15", "11"), SIZES, strict=True))  # of 30: the nearest to these sizes
TEXTS = ("wikitext2_test", "alpaca")
ALIKE = ("random", "l2", "vectorize", "param_mix")  # lines that the figure leaves out
LOST = 1500  # perplexities that it leaves out


def rows_of(runs: Path) -> list[dict[str, Any]]:
    """Return one row for each model that the sweeps measured."""
    rows = []
    for sweep in ("sizes", "half", "depths", "shallower"):
        with (runs / sweep / "results.csv").open(encoding="utf-8") as file:
            for one in csv.DictReader(file):
                size = one.get("prune.target_params") or LAYERS.get(one.get("prune.num_layers", ""), "1")
                row = {"method": method_of(one) if size != "1" else "unpruned", "size": size}
                row |= {"parameters": int(float(one["parameters"])), "seconds": float(one["seconds"] or 0)}
                row |= {text: round(float(one[f"perplexity {text}"]), 2) for text in TEXTS}
                rows += [row] if row not in rows else []
    return rows


def method_of(row: dict[str, str]) -> str:
    """Return the name of a method in the table."""
    if (preset := row.get("prune.preset", "paper")) != "paper":
        return f"preset `{preset}`" + (" after whole layers" if row.get("prune.num_layers") else "")
    if row.get("prune.num_layers"):
        return "whole layers, `block_influence`"
    criterion = row["prune.taylor"] if row["prune.pruner_type"] == "taylor" else row["prune.pruner_type"]
    return f"{row['prune.kinds'].replace(',', ' and ')}, `{criterion}`"


def tables(rows: list[dict[str, Any]]) -> str:
    """Return one table for each text, in Markdown."""
    shown = []
    for text in TEXTS:
        cells = [[text, *SIZES]]
        for method in dict.fromkeys(row["method"] for row in rows if row["size"] != "1"):
            values = {row["size"]: row[text] for row in rows if row["method"] == method}
            cells.append([method, *(f"{values[size]:,.0f}" if size in values else "-" for size in SIZES)])
        shown.append(markdown(cells))
    return "\n\n".join(shown)


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Draw perplexity on the first text against parameters, of methods that differ, where a model is not lost."""
    rows = [row for row in rows if row[TEXTS[0]] < LOST and not any(f"`{one}`" in row["method"] for one in ALIKE)]
    models = [
        MeasuredModel(
            model=f"{row['method']} {row['size']}",
            stage="original" if row["method"] == "unpruned" else "pruned",
            parameters=row["parameters"],
            perplexity={TEXTS[0]: row[TEXTS[0]]},
            name=row["size"],
            method=row["method"].replace("`", ""),
            size=row["size"],
        )
        for row in rows
    ]
    (drawing,) = draw_tradeoffs(models)
    drawing.write(file, file.suffix.lstrip("."))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, help="folder of the sweeps")
    parser.add_argument("--figure", type=Path, help="image of the results to write; its ending says the format")
    parser.add_argument("--print", action="store_true", help="print the tables of the results")
    options = parser.parse_args()
    if options.runs:
        record = {"rows": rows_of(options.runs), **provenance()}
        RESULTS.write_text(json.dumps(record, indent=1) + "\n")
    rows = json.loads(RESULTS.read_text())["rows"]
    if options.figure:
        draw(rows, options.figure)
    if options.print:
        print(tables(rows))


if __name__ == "__main__":
    main()
