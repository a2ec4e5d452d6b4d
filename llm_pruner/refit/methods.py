"""Methods of refitting a pruned model with calibration data and no labels.

``bias`` and ``ridge`` have a closed form (:mod:`~llm_pruner.refit.compensate`). Others train on top of ``ridge``:
``blocks`` block by block (:mod:`~llm_pruner.refit.reconstruct`), ``distill`` all weights together
(:mod:`~llm_pruner.refit.distill`), ``lora`` updates of low rank (:mod:`~llm_pruner.refit.lora`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel

from ..choices import CLOSED_FORM, TRAINED
from ..errors import PrunerError
from ..models.inputs import Inputs, token_count
from ..models.running import check_calibration
from ..selection.plan import PruningPlan
from ..unfinished import NOTHING_KEPT, Unfinished
from .budget import Budget
from .compensate import CompensationReport, compensate
from .distill import distill
from .lora import lora
from .reconstruct import ReconstructReport, reconstruct
from .tokens import KeptTokens
from .training import TrainingReport

DEFAULT_TOKENS = 98_304


@dataclass(frozen=True, kw_only=True)
class RefitReport:
    """Outcome of :func:`refit`: what each of its steps did, None for a step that was not taken.

    Attributes:
        compensation: outcome of the closed form.
        no_compensation: why the model has no closed form, "" if it has.
        blocks: outcome of the reconstruction.
        training: outcome of a training of weights together.
    """

    compensation: CompensationReport | None = None
    no_compensation: str = ""
    blocks: ReconstructReport | None = None
    training: TrainingReport | None = None

    @property
    def tokens(self) -> int:
        """Tokens that the training read: of a reconstruction, those of its longest block."""
        if self.training is not None:
            return self.training.tokens
        return max((block.tokens for block in self.blocks.blocks), default=0) if self.blocks else 0

    def summary(self) -> str:
        """Return the outcome of the training in one line."""
        if self.training is not None:
            one = self.training
            kept = "" if one.after < one.before else ": the weights stay as they were"
            return f"training on {one.tokens:,} tokens: held-out loss {one.before:.4g} -> {one.after:.4g}{kept}"
        blocks = self.blocks.blocks if self.blocks else []
        moved = [block for block in blocks if block.after < block.before]
        gain = 1 - sum(b.after for b in blocks) / max(sum(b.before for b in blocks), 1e-30)
        return f"reconstruction moved {len(moved)} of {len(blocks)} blocks: held-out error {gain:.1%} lower"


def refit(
    model: PreTrainedModel,
    pruned: PreTrainedModel,
    calibration: Inputs,
    method: str = "ridge",
    *,
    plan: PruningPlan | None = None,
    tokens: int | None = None,
    minutes: float | None = None,
    seed: int = 0,
) -> RefitReport:
    """Refit ``pruned`` in place with calibration data and no labels, so that it does what ``model`` does.

    Args:
        model: original model, which stays as it is.
        pruned: pruned model, from :func:`llm_pruner.apply`.
        calibration: LongTensor ``[samples, tokens]`` or other inputs of ``pruned``; at least 32 samples.
        method: ``ridge`` refits projections in closed form, ``bias`` their biases alone; ``blocks`` trains one block
            after the other behind ``ridge``, ``distill`` all weights together on the original's predictions, ``lora``
            updates of low rank on the next tokens of the text. Where there is no closed form, as with fewer hidden
            channels or tokens, these train alone; a cut vocabulary takes ``distill``.
        plan: plan of the pruned model; needed if it lost layers, hidden channels or tokens.
        tokens: tokens to train on: with ``blocks`` of each block, else in all (default: 98,304).
        minutes: time to train; the result then depends on the speed of the machine. With ``tokens``, training ends with
            whichever is spent first.
        seed: of the order of the samples.

    Raises:
        PrunerError: the method is unknown, or cannot refit this model on this calibration set.

    Example:
        >>> import torch, llm_pruner as lp
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        ...                      num_attention_heads=2)
        >>> model = LlamaForCausalLM(config).eval()
        >>> graph = lp.trace(model)
        >>> plan = lp.select(graph, lp.score(model, graph, criterion="l2"), ratio=0.5, kinds=("neurons",))
        >>> pruned = lp.apply(model, plan)
        >>> report = lp.refit(model, pruned, torch.randint(64, (32, 8)), "distill", plan=plan, tokens=2048)
        >>> report.training.tokens  # whole epochs of 30 samples, two are held out
        2160
    """
    if method not in (*CLOSED_FORM, *TRAINED):
        raise PrunerError(f"refit {method!r} is not valid: choose from {', '.join((*CLOSED_FORM, *TRAINED))}")
    calibration = check_calibration(pruned if plan is not None and plan.tokens else model, calibration)
    kept = {path: layers.tolist() for path, layers in plan.layers.items()} if plan else None
    if method in CLOSED_FORM:
        return RefitReport(compensation=compensate(model, pruned, calibration, CLOSED_FORM[method], kept=kept))
    budget = Budget(tokens=DEFAULT_TOKENS if minutes is tokens is None else tokens, minutes=minutes)
    closed_form: CompensationReport | str
    try:
        closed_form = compensate(model, pruned, calibration, kept=kept)
    except PrunerError as error:
        closed_form = str(error)
    report = train(model, pruned, calibration, method, plan=plan, budget=budget, seed=seed)
    if isinstance(closed_form, str):
        return replace(report, no_compensation=closed_form)
    return replace(report, compensation=closed_form)


def train(
    model: PreTrainedModel,
    pruned: PreTrainedModel,
    calibration: Inputs,
    method: str,
    *,
    plan: PruningPlan | None,
    budget: Budget,
    seed: int,
    unfinished: Unfinished = NOTHING_KEPT,
) -> RefitReport:
    """Train a pruned model in place by ``blocks``, ``distill`` or ``lora``, without a closed form before.

    Args:
        unfinished: keeps what is done, and has what a run that was stopped had done.

    Raises:
        PrunerError: as :func:`refit`.
    """
    tokens = _kept_tokens(model, pruned, plan)
    options: Any = {"seed": seed, "unfinished": unfinished}
    if method == "distill":
        return RefitReport(training=distill(model, pruned, calibration, budget, tokens=tokens, **options))
    if tokens is not None:
        raise PrunerError(f"refit {method!r} needs one vocabulary, and the plan cuts it: use distill")
    if method == "blocks":
        return RefitReport(blocks=reconstruct(model, pruned, calibration, budget, plan=plan, **options))
    return RefitReport(training=lora(model, pruned, calibration, budget, **options))


def _kept_tokens(model: PreTrainedModel, pruned: PreTrainedModel, plan: PruningPlan | None) -> KeptTokens | None:
    """Return the tokens that the pruned model kept; None if both models have the same.

    Raises:
        PrunerError: the vocabularies differ, and the plan is not about them.
    """
    theirs, ours = token_count(model), token_count(pruned)
    if theirs == ours:
        return None
    choice = plan.vocabulary if plan is not None else None
    if choice is None or (choice.size, len(choice.kept)) != (theirs, ours):
        raise PrunerError(
            f"a refit needs one vocabulary, and these have {theirs} and {ours} tokens: give plan, the one that cut it"
        )
    return KeptTokens(choice.kept)
