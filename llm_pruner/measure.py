"""The evaluation behind ``llm-pruner evaluate`` and recipes: models side by side, and the files of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.table import Table as Shown

from .arguments import EvaluateArguments, at_least, device_of
from .checkpoint import load, locate
from .data import text
from .errors import PrunerError
from .evaluation import PAPER_TASKS, PROMPTS, Evaluation, Table, Wanted, as_json, compare
from .files import write_text
from .provenance import provenance


def measured(args: EvaluateArguments) -> list[Evaluation]:
    """Measure what the arguments say.

    Raises:
        PrunerError: bad arguments, or a model, text or task that is not to be had.
    """
    if not args.models:
        raise PrunerError("name at least one model: llm-pruner evaluate MODEL [MODEL ...]")
    at_least(args, 0, "batch_size", "max_windows", "stride", "tokens")
    at_least(args, 1, "batch", "new_tokens")
    for model in args.models:
        locate(model)
    device = device_of("device", args.device)
    tasks = PAPER_TASKS if args.tasks == "paper" else tuple(t.strip() for t in args.tasks.split(",") if t.strip())
    wanted = Wanted(
        {name: text(name, "test") for name in args.datasets.split(",") if name},
        args.seq_len,
        args.stride or None,
        args.max_windows or None,
        args.batch_size or None,
        tasks,
        args.include_path,
        args.limit,
        args.num_fewshot,
        args.tokens,
        args.batch,
        args.new_tokens,
        PROMPTS if args.samples else (),
    )

    def loaded(name: str) -> Any:
        return load(name, args.dtype, device, args.trust_remote_code, verify=args.verify)

    return compare(args.models, loaded, wanted)


def shown(cells: list[list[str]]) -> Shown:
    """Cells as a table for the terminal; the first row are its heads."""
    out = Shown(*cells[0])
    for row in cells[1:]:
        out.add_row(*row)
    return out


def write(found: list[Evaluation], result: Table, folder: Path) -> None:
    """Write the tables, what they were made of, and lm-eval's own results."""
    files = {"table.csv": result.csv(), "table.md": result.markdown(), "table.tex": result.latex()}
    files["evaluation.json"] = as_json(found, provenance())
    files |= {
        f"lm_eval/{i}_{Path(one.model).name}.json": json.dumps(one.results, indent=1, default=str) + "\n"
        for i, one in enumerate(found)
        if one.results
    }
    for name, content in files.items():
        write_text(folder / name, content)
