"""Tabulate what a pruning run measured before and after."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..display import Cells

METRICS_FILE = "metrics.json"  # of a run's folder


def before_and_after(metrics: Mapping[str, Any]) -> Cells:
    """Return a table of parameters, perplexities and losses before and after pruning, head first.

    Args:
        metrics: content of ``metrics.json``.

    >>> text = {"perplexity": 20.0855, "tokens": 4096, "seq_len": 128}
    >>> sizes = {"parameters_before": 134515008, "parameters_after": 107612008}
    >>> for row in before_and_after(sizes | {"before": {"perplexity": {"general": text}}, "after": {"perplexity": {}}}):
    ...     print(row)
    ['', 'before', 'after']
    ['parameters', '134,515,008', '107,612,008 (80.0%)']
    """
    before, after = metrics["parameters_before"], metrics["parameters_after"]
    columns, stages = ["before", "after"], [metrics["before"], metrics["after"]]
    parameters = [f"{before:,}", f"{after:,} ({after / before:.1%})"]
    if routed := metrics.get("experts_per_token"):
        columns.insert(1, f"{routed['after']} of {routed['before']} experts per token")
        stages.insert(1, routed)
        parameters.insert(1, f"{before:,}")
    cells = [["", *columns], ["parameters", *parameters]]
    for text, measured in metrics["after"]["perplexity"].items():
        if all(text in stage.get("perplexity", {}) for stage in stages):
            values = [stage["perplexity"][text]["perplexity"] for stage in stages]
            if None in values:  # not finite
                continue
            name = f"{Path(text).name} ({measured['tokens']:,} tokens)"
            cells.append([f"perplexity, {name}", *(f"{value:.2f}" for value in values)])
            cells.append(["loss, nats per token", *(f"{math.log(value):.3f}" for value in values)])
    return cells
