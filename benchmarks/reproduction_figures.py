"""Draw the ablations of the recipe paper/smollm2, from the folder of its runs.

python benchmarks/reproduction_figures.py runs/paper/smollm2 docs/explanation/figures
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

CRITERIA = {
    "random": {"prune.pruner_type": "random"},
    "L1": {"prune.pruner_type": "l1"},
    "L2": {"prune.pruner_type": "l2"},
    "vector": {"prune.taylor": "vectorize"},
    "element¹": {"prune.taylor": "param_first"},
    "element²": {"prune.taylor": "param_second"},
    "element¹, mix": {"prune.taylor": "param_mix"},
    "element¹, global": {"prune.taylor": "param_first", "prune.global_pruning": True},
}
SUM = {"prune.taylor": "param_first"}
AGGREGATIONS = {"sum": SUM} | {
    name: SUM | {"prune.grouping_strategy": name} for name in ("mean", "max", "prod", "first", "last")
}
SAMPLES = {"10": SUM} | {str(n): SUM | {"prune.num_examples": n} for n in (20, 50, 100)}
RATIO = "prune.pruning_ratio"


def draw(results: pd.DataFrame, groups: dict[str, dict[str, Any]], title: str, file: Path, *, log: bool) -> None:
    """Draw bars of mean perplexity with standard deviations over seeds, a group of them for each ratio."""
    (column,) = [key for key in results if key.startswith("perplexity")]
    points = results[results["point"] > 0]
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots()
    ratios = sorted(points[RATIO].unique())
    for i, ratio in enumerate(ratios):
        runs = [_runs_of(points, group | {RATIO: ratio})[column] for group in groups.values()]
        places = [x + (i - (len(ratios) - 1) / 2) * 0.38 for x in range(len(groups))]
        means, deviations = [values.mean() for values in runs], [values.std() for values in runs]
        bars = axes.bar(places, means, 0.36, yerr=deviations, capsize=2, label=f"ratio {ratio}")
        axes.bar_label(bars, fmt="{:.0f}", fontsize=7)
    axes.axhline(results[column].iloc[0], color="gray", linestyle=":", label="unpruned")
    axes.set_xticks(range(len(groups)), list(groups))
    axes.set_ylabel("perplexity on WikiText-2")
    axes.set_title(title)
    if log:
        axes.set_yscale("log")
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=110)


def _runs_of(points: pd.DataFrame, values: dict[str, Any]) -> pd.DataFrame:
    """Return the runs of the point that varies exactly these values."""
    keys = [key for key in points if key.startswith("prune.")]
    same = [points[key] == values[key] if key in values else points[key].isna() for key in keys]
    return points[pd.concat(same, axis=1).all(axis=1)]


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(f"usage: python {sys.argv[0]} FOLDER OUT")
    table = pd.DataFrame(json.loads((Path(sys.argv[1]) / "results.json").read_text(encoding="utf-8")))
    folder = Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    draw(table, CRITERIA, "how importance is estimated", folder / "reproduction_criteria.png", log=True)
    draw(table, AGGREGATIONS, "how it is aggregated (element¹)", folder / "reproduction_aggregation.png", log=False)
    draw(table, SAMPLES, "calibration samples (element¹)", folder / "reproduction_samples.png", log=False)
