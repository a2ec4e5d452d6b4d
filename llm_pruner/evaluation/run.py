"""The evaluation behind ``llm-pruner evaluate`` and recipes: models side by side, and the files of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..arguments import EvaluateArguments, listed
from ..checkpoint import load, locate
from ..data import text
from ..files import write_text
from ..provenance import provenance
from .compare import PROMPTS, Evaluation, Wanted, compare
from .table import Table, as_json
from .zero_shot import PAPER_TASKS


def measured(args: EvaluateArguments) -> list[Evaluation]:
    """Measure what the arguments say.

    Raises:
        PrunerError: bad arguments, or a model, text or task that is not to be had.
    """
    args.check()
    for model in args.models:
        locate(model)
    tasks = PAPER_TASKS if args.tasks == "paper" else tuple(listed(args.tasks))
    wanted = Wanted(
        {name: text(name, "test") for name in listed(args.datasets)},
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
        return load(name, args.dtype, args.device, args.trust_remote_code, verify=args.verify)

    return compare(args.models, loaded, wanted)


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
