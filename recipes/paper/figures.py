"""Figures of the ablations in smollm2.yaml: python recipes/paper/figures.py runs/paper/smollm2 docs/figures"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

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


def drawn(rows: list[dict[str, Any]], groups: dict[str, dict[str, Any]], title: str, log: bool, file: Path) -> None:
    """Bars of perplexity with standard deviations, a group of them for each ratio."""
    ratios = sorted({row[RATIO] for row in rows if row["point"]})
    (column,) = [key for key in rows[0] if key.startswith("perplexity")]
    figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
    for i, ratio in enumerate(ratios):
        means, deviations = [], []
        for point in groups.values():
            varied = point | {RATIO: ratio}
            found = [r[column] for r in rows if r["point"] and _values(r) == varied]
            means.append(statistics.fmean(found))
            deviations.append(statistics.stdev(found) if len(found) > 1 else 0.0)
        places = [x + (i - (len(ratios) - 1) / 2) * 0.38 for x in range(len(groups))]
        bars = axes.bar(places, means, 0.36, yerr=deviations, capsize=2, label=f"ratio {ratio}")
        axes.bar_label(bars, fmt="{:.0f}", fontsize=7)
    axes.axhline(rows[0][column], color="gray", linestyle=":", label="unpruned")
    axes.set_xticks(range(len(groups)), list(groups))
    axes.set_ylabel("perplexity on WikiText-2")
    axes.set_title(title)
    if log:
        axes.set_yscale("log")
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _values(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key.startswith("prune.")}


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(f"usage: python {sys.argv[0]} FOLDER OUT")
    results = json.loads((Path(sys.argv[1]) / "results.json").read_text(encoding="utf-8"))
    out = Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    drawn(results, CRITERIA, "how importance is estimated", True, out / "reproduction_criteria.png")
    drawn(results, AGGREGATIONS, "how it is aggregated (element¹)", False, out / "reproduction_aggregation.png")
    drawn(results, SAMPLES, "calibration samples (element¹)", False, out / "reproduction_samples.png")
