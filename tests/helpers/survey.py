"""Test on a model what works: both oracles, live, reloaded and generating with its cache, for every kind of unit.

``make supported-models`` asks this of every architecture that transformers registers and writes the pages of
:data:`SURVEYS`; ``tests/test_registry.py`` asks the same as a test.
"""

from __future__ import annotations

import copy
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

import llm_pruner as lp
from helpers.architectures import IMAGE_TEXT, image_text_types, media_types, model_types, other_types, tiny_model
from llm_pruner.graph.permutation import LOGIT_TOLERANCE, check_permutation
from llm_pruner.graph.units import CouplingGraph
from llm_pruner.models.inputs import (
    ModelInputs,
    example_inputs,
    has_remembered_inputs,
    inputs_with_image,
    reads_text_only,
    reads_whole_text,
    share_inputs,
)
from llm_pruner.models.per_layer import has_per_layer_widths
from llm_pruner.models.running import logits, main_output, relative_difference, without_cache
from llm_pruner.selection.plan import PruningPlan
from llm_pruner.surgery.config.stacks import configs_in
from llm_pruner.surgery.slicing import mask

# Whole layers and the vocabulary have an order of their own, which neither oracle can judge.
KINDS = ("neurons", "heads", "query_heads", "experts", "hidden", "channels")
CLASS_KINDS = ("neurons", "heads")
NEW_TOKENS = 4
REFERENCE = Path(__file__).resolve().parents[2] / "docs" / "reference"


@dataclass
class Outcome:
    """One kind of unit in one model: how many there are, which fail the permutation test, and what pruning gave."""

    units: int
    wrong: list[str] = field(default_factory=list)
    without_effect: list[str] = field(default_factory=list)
    refused: str = ""
    failed: str = ""
    plain: bool = False  # an ordinary config carries what is left

    @property
    def works(self) -> bool:
        return not (self.wrong or self.without_effect or self.failed or self.refused)


@dataclass
class Row:
    """One architecture; ``refused`` says why it could not be traced, ``unbuilt`` why there is no tiny model of it."""

    name: str
    kinds: dict[str, Outcome] = field(default_factory=dict)
    frozen: list[str] = field(default_factory=list)
    refused: str = ""
    unbuilt: str = ""
    with_image: bool = False
    seconds: float = 0.0  # for trace and permutation test

    def works(self, kind: str) -> bool:
        return kind in self.kinds and self.kinds[kind].works


def survey(name: str, kinds: Iterable[str] = KINDS) -> Row:
    row = Row(name)
    try:
        model = tiny_model(name)
    except Exception as error:
        row.unbuilt = f"{type(error).__name__}: {error}"
        return row
    with tempfile.TemporaryDirectory() as folder:  # as a checkpoint gives it, without what none holds
        lp.save(model, None, Path(folder) / "model")
        model = type(model).from_pretrained(Path(folder) / "model").eval()
    start = time.perf_counter()
    try:
        image = _image_for(model) if name.endswith(IMAGE_TEXT) else None
        row.with_image = image is not None
        graph = lp.trace(model, inputs=image)
    except lp.PrunerError as error:
        row.refused = str(error)
        return row
    if not logits(model, example_inputs(model)).isfinite().all():
        row.refused = "its output on random inputs is not finite"
        return row
    row.frozen = sorted({f"{u.kind}: {u.frozen}" for u in graph.frozen if len(u.dims) > 1})
    for kind in kinds:
        if units := graph.of_kind(kind):
            row.kinds[kind] = Outcome(len(units))
            for unit in units:
                report = check_permutation(model, unit)
                if not report.difference <= LOGIT_TOLERANCE:
                    row.kinds[kind].wrong.append(f"{unit.name} ({report.difference:.1e})")
                elif not report.passed:
                    row.kinds[kind].without_effect.append(f"{unit.name} ({report.effect:.1e})")
    row.seconds = time.perf_counter() - start
    for kind, outcome in row.kinds.items():
        _prune(model, graph, kind, outcome)
    return row


def _image_for(model: PreTrainedModel) -> ModelInputs | None:
    return inputs_with_image(model, rows=1, tokens=16, generator=torch.Generator().manual_seed(0))


def _prune(model: PreTrainedModel, graph: CouplingGraph, kind: str, out: Outcome) -> None:
    try:
        plan = lp.select(graph, lp.score(model, graph, criterion="random"), 0.5, kinds=[kind])
        pruned = lp.apply(model, plan)
    except lp.PrunerError as error:
        out.refused = str(error)
        return
    out.plain = not any(has_per_layer_widths(config) for _, config in configs_in(pruned.config))
    exact = not any(graph.unit(name).flags for name in plan.units)
    if (exact or kind in ("hidden", "experts")) and not (report := lp.verify(model, pruned, plan)).equivalent:
        out.failed = f"not mask-equivalent: {report.relative:.1e}"
    else:
        out.failed = _after_reloading(model, pruned, plan, exact)


def _after_reloading(model: PreTrainedModel, pruned: PreTrainedModel, plan: PruningPlan, exact: bool) -> str:
    """Save, load, generate with the cache; every step's logits must be the masked original's.

    Where zeroing is not removing, the reference is the pruned model before it was saved.
    """
    ids = torch.randint(2, 90, (2, 12), generator=torch.Generator().manual_seed(1))
    with tempfile.TemporaryDirectory() as folder:
        lp.save(pruned, None, Path(folder) / "model")
        loaded = type(pruned).from_pretrained(Path(folder) / "model").eval()
    share_inputs(loaded, model)
    if (change := relative_difference(_forward(loaded, ids), _forward(pruned, ids))) > 1e-5:
        return f"reloading changes the logits by {change:.1e}"
    if not (model.can_generate() and reads_text_only(model)):
        return ""
    try:
        expected, theirs = _generated(masked_copy(model, plan) if exact else pruned, ids)
    except Exception:  # transformers cannot generate with the unpruned model either
        return ""
    try:
        steps, ours = _generated(loaded, ids)
    except Exception as error:
        return f"generation fails: {type(error).__name__}: {error}"
    same = int((ours == theirs).all(0).long().cumprod(0).sum())  # a tie may be broken otherwise; then paths part
    length = min(NEW_TOKENS, same + 1 - (ours.shape[1] - NEW_TOKENS))
    if (change := relative_difference(steps[:, :length], expected[:, :length])) > LOGIT_TOLERANCE:
        return f"generation with the cache is off by {change:.1e}"
    return ""


def masked_copy(model: PreTrainedModel, plan: PruningPlan) -> PreTrainedModel:
    """The model at its full size, with everything that the plan removes set to zero."""
    out = copy.deepcopy(model)
    with torch.no_grad():
        for name, tensor in [*out.named_parameters(), *out.named_buffers()]:
            if name in plan.kept:
                tensor.copy_(mask(name, tensor, plan))
    return out


@torch.no_grad()
def _forward(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    if has_remembered_inputs(model) or not reads_text_only(model):
        return logits(model, example_inputs(model, seed=1))
    if reads_whole_text(model):
        return logits(model, ids)
    both = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return main_output(model(input_ids=ids, **both, **without_cache(model))).float()


@torch.no_grad()
def _generated(model: PreTrainedModel, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy generation: logits of every step ``[rows, steps, vocabulary]``, and the tokens."""
    start = {"decoder_start_token_id": 0} if model.config.is_encoder_decoder else {}
    out = model.generate(
        ids,
        **start,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        num_beams=1,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.stack(out.logits, 1).float(), out.sequences


def support_page(rows: list[Row]) -> str:
    """Return the page of what works, one row per architecture, as Markdown."""
    built = [row for row in rows if not row.unbuilt]
    counts = {kind: sum(row.works(kind) for row in built) for kind in KINDS}
    causal = [row for row in built if ":" not in row.name]
    lines = [
        "# Supported models",
        "",
        f"llm-pruner prunes the MLP neurons of {counts['neurons']} and the attention heads of {counts['heads']} of "
        f"{len(built)} architectures. The table lists the",
        f"architectures that transformers {transformers.__version__} registers for causal language models and, marked "
        "seq2seq, for",
        "sequence-to-sequence models.",
        "[Unsupported units](unsupported.md) gives the reason of every refusal.",
        "",
        "```bash",
        "make supported-models     # writes both pages",
        "```",
        "",
        "| cell | meaning |",
        "|---|---|",
        "| plain | works, and stock transformers loads the result |",
        "| ours | works, and the result loads after `import llm_pruner`: no config of the architecture expresses it |",
        "| refused | does not work; llm-pruner refuses it with a reason |",
        "| empty | the architecture has no such unit |",
        "",
        "Every architecture is built tiny with random weights and pruned by half, one kind of unit at a time. A kind",
        "works if",
        "",
        "* permuting each of its units leaves the logits unchanged;",
        "* the pruned model gives the logits of the original with the removed slices set to zero (not tested where a",
        "  norm reads them);",
        "* the pruned model survives saving and loading;",
        "* generation with its cache gives the logits of the masked original.",
        "",
        f"{len(rows)} architectures are registered. {len(built)} can be built tiny, {len(causal)} of them causal:",
        "",
        *_table(["", *KINDS], [["works in", *(str(count) for count in counts.values())]]),
        "",
        *_filterable(["architecture", *KINDS], [[_title(row), *(_cell(row, kind) for kind in KINDS)] for row in built]),
    ]
    return "\n".join(lines) + "\n"


def refusal_page(rows: list[Row]) -> str:
    """Return the page of what is refused and why, as Markdown."""
    lines = [
        "# Unsupported units",
        "",
        "The table gives the reason of every refusal in [supported models](supported-models.md), shortened to a line.",
        "[Diagnose a model](../how-to/diagnose-a-model.md) explains the reasons.",
        "",
        *_filterable(["architecture", "unit", "reason"], _refusals(rows)),
        "",
        "## Not built",
        "",
        "No tiny model could be built from the default config of these architectures, so they were not tested:",
        "",
        *_table(["architecture", "error"], [[_title(row), _short(row.unbuilt)] for row in rows if row.unbuilt]),
    ]
    return "\n".join(lines) + "\n"


def _refusals(rows: list[Row]) -> list[list[str]]:
    refusals = []
    for row in rows:
        if row.refused:
            refusals.append([_title(row), "all", _short(row.refused)])
        for kind, outcome in row.kinds.items():
            problem = outcome.refused or outcome.failed
            if outcome.wrong or outcome.without_effect:
                problem = "frozen by the permutation test: " + ", ".join([*outcome.wrong, *outcome.without_effect][:2])
            if problem:
                refusals.append([_title(row), kind, _short(problem)])
    return refusals


def _filterable(head: list[str], rows: list[list[str]]) -> list[str]:
    """Return a table that docs/assets/tables.js filters and sorts; it reads as a plain table elsewhere."""
    return ['<div class="filterable" markdown>', "", *_table(head, rows), "", "</div>"]


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]


def class_page(rows: list[Row], title: str, reads: str) -> str:
    """Return a page of classes that are no language models, one row per architecture, as Markdown."""
    built = [row for row in rows if not row.unbuilt]
    found: dict[str, dict[str, str]] = {}
    for row in rows:
        model_type, _, task = row.name.partition(":")
        works = [kind for kind in CLASS_KINDS if row.works(kind)]
        found.setdefault(model_type, {})[task] = "" if row.unbuilt else ", ".join(works) or "refused"
    tasks = list(dict.fromkeys(row.name.partition(":")[2] for row in rows))
    counts = {kind: sum(row.works(kind) for row in built) for kind in CLASS_KINDS}
    lines = [
        f"# {title}",
        "",
        f"transformers {transformers.__version__} registers {len(rows)} classes that read {reads}.",
        f"{len(built)} of them can be built tiny: neurons can be pruned in {counts['neurons']}, heads in "
        f"{counts['heads']}. They are tested as",
        "[language models](supported-models.md) are. A cell names the kinds that work; it is empty where there is no",
        "such class, or none that can be built tiny.",
        *_about_images(built),
        "",
        "```bash",
        "make supported-models     # writes this page too",
        "```",
        "",
        *_filterable(
            ["architecture", *tasks], [[name, *(cells.get(t, "") for t in tasks)] for name, cells in found.items()]
        ),
        "",
        "## Refused",
        "",
        *_filterable(["class", "unit", "reason"], _refusals(rows)),
    ]
    return "\n".join(lines) + "\n"


def _about_images(built: list[Row]) -> list[str]:
    shown = sum(row.with_image for row in built)
    if not shown:
        return []
    return [
        f"{shown} of them are shown a random image, so that the units of their vision towers are tested too. The",
        "others are tested on text, since their config does not tell what their images look like.",
    ]


# What is asked, of which kinds of units, and the pages of the answers.
SURVEYS: dict[str, Any] = {
    "models": (model_types, KINDS, {"supported-models.md": support_page, "unsupported.md": refusal_page}),
    "classes": (
        other_types,
        CLASS_KINDS,
        {
            "supported-classes.md": partial(
                class_page, title="Supported classes", reads="text and are no language models"
            )
        },
    ),
    "media": (
        media_types,
        CLASS_KINDS,
        {
            "supported-media.md": partial(
                class_page,
                title="Classes of images and sounds",
                reads="images or sounds and are no language models",
            )
        },
    ),
    "image_texts": (
        image_text_types,
        CLASS_KINDS,
        {
            "supported-image-text.md": partial(
                class_page,
                title="Language models that read images",
                reads="images and write text",
            )
        },
    ),
}


def _title(row: Row) -> str:
    return row.name.replace(":", ", ")


def _cell(row: Row, kind: str) -> str:
    if row.refused:
        return "refused"
    outcome = row.kinds.get(kind)
    if outcome is None:
        return ""
    return ("plain" if outcome.plain else "ours") if outcome.works else "refused"


def _short(text: str) -> str:
    text = re.sub(
        r"no config of \w+ (has the shapes that the plan leaves|carries the plan): ", "", " ".join(text.split())
    )
    return (text if len(text) <= 160 else text[:157] + "...").replace("|", "/").replace("<", "&lt;")


def _quiet() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def main() -> None:
    """Ask the surveys that are named, or single architectures, which are printed alone."""
    asked = [one for one in sys.argv[1:] if one in SURVEYS] or ["models"]
    names = [one for one in sys.argv[1:] if one not in SURVEYS]
    with ProcessPoolExecutor(initializer=_quiet) as pool:
        for survey_name in asked:
            all_names, kinds, pages = SURVEYS[survey_name]
            rows = []
            for row in pool.map(partial(survey, kinds=kinds), names or all_names()):
                rows.append(row)
                state = row.unbuilt or row.refused or " ".join(k for k, o in row.kinds.items() if o.works)
                print(f"{row.name}: {_short(state)}", flush=True)
            for name, page in pages.items() if not names else ():
                (REFERENCE / name).write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
