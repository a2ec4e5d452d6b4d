"""What works on a model: both oracles, live, reloaded and generating with its cache, for every kind of unit."""

from __future__ import annotations

import copy
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedModel

import llm_pruner as lp
from llm_pruner.graph import CouplingGraph, model_inputs
from llm_pruner.graph.verify import TOLERANCE, check_permutation, relative_difference
from llm_pruner.selection import PruningPlan
from llm_pruner.surgery.config_solver import _configs
from llm_pruner.surgery.heterogeneous import _differs
from llm_pruner.surgery.slicing import masked

# Kinds that mask equivalence or permutation can judge; whole layers and the vocabulary have an order of their own.
KINDS = ("neurons", "heads", "query_heads", "experts", "hidden", "channels")
NEW_TOKENS = 4


@dataclass
class Outcome:
    """One kind of unit in one model: how many there are, which failed the permutation test, and what pruning gave."""

    units: int
    wrong: list[str] = field(default_factory=list)
    without_effect: list[str] = field(default_factory=list)
    refused: str = ""
    failed: str = ""
    plain: bool = False  # carried by an ordinary config

    @property
    def right(self) -> bool:
        return not (self.wrong or self.without_effect or self.failed)

    @property
    def works(self) -> bool:
        return self.right and not self.refused


@dataclass
class Row:
    name: str
    kinds: dict[str, Outcome] = field(default_factory=dict)
    frozen: dict[str, str] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)
    refused: str = ""
    seconds: float = 0.0


def survey(name: str, model: PreTrainedModel, kinds=KINDS) -> Row:
    row = Row(name)
    with tempfile.TemporaryDirectory() as folder:  # what a checkpoint holds of it
        lp.save(model, None, Path(folder) / "m")
        model = type(model).from_pretrained(Path(folder) / "m").eval()
    try:
        start = time.perf_counter()
        graph = lp.trace(model)
    except lp.PrunerError as error:
        row.refused = str(error)
        return row
    row.seconds = time.perf_counter() - start
    row.unknown = graph.unknown_operators
    for unit in graph.frozen:
        if len(unit.dims) > 1:
            row.frozen.setdefault(f"{unit.kind}: {unit.frozen}", unit.name)
    for kind in kinds:
        if graph.of_kind(kind):
            row.kinds[kind] = _outcome(model, graph, kind)
    return row


def _outcome(model: PreTrainedModel, graph: CouplingGraph, kind: str) -> Outcome:
    units = graph.of_kind(kind)
    out = Outcome(len(units))
    for unit in units:
        report = check_permutation(model, unit)
        if not report.difference <= TOLERANCE:
            out.wrong.append(f"{unit.name} ({report.difference:.1e})")
        elif not report.effect > TOLERANCE:
            out.without_effect.append(f"{unit.name} ({report.effect:.1e})")
    scores = lp.score(model, graph, criterion="random")
    try:
        plan = lp.select(graph, scores, 0.5, kinds=[kind])
        pruned = lp.apply(model, plan)
    except lp.PrunerError as error:
        out.refused = str(error)
        return out
    out.plain = not (pruned.config.get_text_config().is_heterogeneous or hasattr(pruned.config.get_text_config(), "submodule_overrides"))
    exact = not any(u.flags for u in units if u.name in plan.units)
    if exact and not (report := lp.verify(model, pruned, plan)).equivalent:
        out.failed = f"not mask-equivalent: {report.relative:.1e}"
        return out
    out.failed = _reloaded(model, pruned, plan, exact)
    return out


def _reloaded(model: PreTrainedModel, pruned: PreTrainedModel, plan: PruningPlan, exact: bool) -> str:
    """Save, load, generate with the cache; every step's logits must be the masked original's.

    Where zeroing is not removing, the reference is the pruned model before it was saved.
    """
    ids = torch.randint(2, 90, (2, 12), generator=torch.Generator().manual_seed(1))
    with tempfile.TemporaryDirectory() as folder:
        lp.save(pruned, None, Path(folder) / "m")
        loaded = type(pruned).from_pretrained(Path(folder) / "m").eval()
    if (change := relative_difference(forward(loaded, ids), forward(pruned, ids))) > 1e-5:
        return f"reloading changes the logits by {change:.1e}"
    if not model.can_generate():
        return ""
    reference = masked_copy(model, plan) if exact else pruned
    try:
        expected, theirs = generated(reference, ids)
    except Exception:  # transformers cannot generate with the unpruned model either
        return ""
    try:
        steps, ours = generated(loaded, ids)
    except Exception as error:
        return f"generation fails: {type(error).__name__}: {error}"
    same = int((ours == theirs).all(0).long().cumprod(0).sum())  # a tie may be broken otherwise; then paths part
    length = min(NEW_TOKENS, same + 1 - (ours.shape[1] - NEW_TOKENS))
    if (change := relative_difference(steps[:, :length], expected[:, :length])) > TOLERANCE:
        return f"generation with the cache is off by {change:.1e}"
    return ""


def masked_copy(model: PreTrainedModel, plan: PruningPlan) -> PreTrainedModel:
    out = copy.deepcopy(model)
    with torch.no_grad():
        for name, tensor in [*out.named_parameters(), *out.named_buffers()]:
            if name in plan.kept:
                tensor.copy_(masked(name, tensor, plan))
    return out


@torch.no_grad()
def forward(model, ids, sequence=None):
    sequence = ids if sequence is None else sequence
    if model.config.is_encoder_decoder:
        return model(input_ids=ids, decoder_input_ids=sequence, use_cache=False).logits.float()
    return model(input_ids=sequence, use_cache=False).logits.float()


@torch.no_grad()
def generated(model, ids):
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False,
        output_logits=True, return_dict_in_generate=True, pad_token_id=0, num_beams=1,
    )
    return torch.stack(out.logits, 1).float(), out.sequences
