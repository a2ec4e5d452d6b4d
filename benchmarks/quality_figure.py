"""Draw the README's figure: perplexity against parameters on SmolLM2-135M.

    python benchmarks/quality_figure.py docs/figures/perplexity.svg

WikiText-2 test, 256 windows of 128 tokens, C4 calibration. The numbers of llm-pruner are those of results/presets.json;
the others are of LLM-Pruner's own code in its documented setting (10 samples of 64 tokens, layers 4 to 27).
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from llm_pruner.report.runs import MeasuredModel
from llm_pruner.report.tradeoffs import draw_tradeoffs

PARAMETERS = 134_515_008
TEXT = "WikiText-2"
UNPRUNED = 52.8
LLM_PRUNER = {0.786: 224.9, 0.711: 284.0}
RESULTS = Path(__file__).parent / "results" / "presets.json"


def methods() -> dict[str, dict[float, float]]:
    """Return perplexities by method and size."""
    rows = json.loads(RESULTS.read_text())["rows"]
    mine = [row for row in rows if (row["model"], row["text"]) == ("smollm2-135m", "c4")]
    ours = {
        f"llm-pruner, preset {preset}": {
            size: statistics.mean(row["after"]["wikitext2_test"] for row in mine if key(row) == (preset, size))
            for size in sorted({float(row["size"]) for row in mine if row["method"] == preset})
        }
        for preset in ("best", "fast")
    }
    return ours | {"LLM-Pruner, param_first": LLM_PRUNER}


def key(row: dict[str, Any]) -> tuple[str, float]:
    """Return the preset and the size of a run."""
    return row["method"], float(row["size"])


def models() -> list[MeasuredModel]:
    """Return the measured points."""
    measured = [("original", "SmolLM2-135M", 1.0, UNPRUNED)]
    measured += [
        (method, f"{share}", share, value) for method, row in methods().items() for share, value in row.items()
    ]
    return [
        MeasuredModel(
            model=f"{method} {share}",
            stage="original" if method == "original" else "pruned",
            parameters=round(share * PARAMETERS),
            perplexity={TEXT: value},
            name=name,
            method=method,
            size=name,
        )
        for method, name, share, value in measured
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="image to write; its ending says the format")
    file = Path(parser.parse_args().file)
    (drawing,) = draw_tradeoffs(models())
    drawing.write(file, file.suffix.lstrip("."))


if __name__ == "__main__":
    main()
