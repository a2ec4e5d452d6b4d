"""Compensation: refit projections of each layer after pruning, so that its output stays close to the original's.

Removing neurons and heads changes the inputs of every later layer. Compensation visits the layers from first to last,
with the original's residual stream h and the pruned model's stream p side by side. In each layer, every projection W
whose output is added to the stream (``o_proj`` and ``down_proj`` of a Llama) is moved by the ridge regression

    D = argmin  sum_t v_t |h_t - p_t - D x_t|^2  +  lambda * sum_j mean(x_j^2) |D_j|^2

over the calibration tokens t, where x is the input of W and h_t - p_t the error of the stream just behind it. The prior
is the same for every channel once its scale is taken out. The weight v_t is 1 for ordinary tokens; the few tokens of
huge norm that language models have would dominate the sum, and weigh 1 / |h_t|^2. Since p carries the errors of all
earlier layers, each layer also corrects those. Held-out calibration samples choose lambda. A projection with a bias has
one more channel, always 1, whose column moves the bias; with the method ``bias`` it is the only channel, which is the
compensation of FLAP (arXiv 2312.11983, section 3) for the mean error of all layers so far.

In a mixture whose experts' output is added to the stream, the down projections of the experts are refitted last
(:mod:`llm_pruner.refit.experts`).

Layers of BERT's kind normalise the stream behind each sum. There h_t and p_t are the sums in front of the norms. Layers
of Gemma 2's kind normalise what a projection writes before they add it: g W x / r, with g the weight of the norm and r
the root of the mean square of W x. There the change of the stream is g D x / r, with r as it is.

Of several stacks of layers, such as an encoder and a decoder, those that lost something are refitted one after the
other. At the end, the logits are scaled (:mod:`llm_pruner.refit.temperature`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import PrunerError
from ..models.arithmetic import exact_arithmetic
from ..models.blockwise import NARROW, computing, native_compute
from ..models.inputs import Inputs, token_count
from ..models.processes import gathered, own_share
from ..models.running import check_calibration, evaluating, implementations
from ..progress import track
from ..unfinished import NOTHING_KEPT, Kept, Unfinished
from .added import added_experts, added_projections
from .experts import refit_experts
from .layer_by_layer import keep_layers, restore_layers
from .matching import KeptLayers, MatchingStack, cut_stacks
from .regression import HELD_OUT, RegressionSums, best_ridge
from .stream import Projection, ResidualStream
from .temperature import scale_logits

TEMPERATURE_SAMPLES = 16
SAMPLES_PER_PASS = 8  # samples in a forward pass
MIN_SAMPLES = 4 * SAMPLES_PER_PASS
METHODS = ("least_squares", "bias")


@dataclass
class Refit:
    """Outcome for one projection.

    Attributes:
        module: path of the projection, or of the module of a layer's experts.
        before: relative squared error of the stream behind the projection on held-out samples, before the refit.
        after: the same error after the refit.
        ridge: lambda, of experts the median; None if no lambda lowered the error, and nothing was moved.
    """

    module: str
    before: float
    after: float
    ridge: float | None


@dataclass
class CompensationReport:
    """Outcome of :func:`compensate`.

    Attributes:
        layers: outcome for every projection, from the first layer to the last.
        temperature: factor of the logits; None if no weight scales them.
    """

    layers: list[Refit] = field(default_factory=list)
    temperature: float | None = None


@torch.no_grad()
def compensate(
    model: PreTrainedModel,
    pruned: PreTrainedModel,
    calibration: Inputs,
    method: str = "least_squares",
    *,
    kept: KeptLayers | None = None,
    unfinished: Unfinished = NOTHING_KEPT,
) -> CompensationReport:
    """Refit the projections of ``pruned`` in place, so that the outputs of its layers approach those of ``model``.

    Args:
        model: original model, which stays as it is.
        pruned: pruned model, from :func:`llm_pruner.apply`.
        calibration: LongTensor ``[samples, tokens]``; at least 32 samples, a quarter of which is held out.
        method: ``least_squares`` moves weights and biases, ``bias`` only biases
            (:func:`llm_pruner.refit.biases.with_biases` gives a model some).
        kept: indices of the original's layers that the pruned model keeps, in order (default: all), of a stack that
            lost layers; by the path of the stack where several did. The last projection before a gap makes up for the
            dropped layers: its target is the stream behind them.
        unfinished: keeps the layers that are done, and has those of a run that was stopped.

    Returns:
        Relative squared errors at every projection before and after, and the factor of the logits.

    Raises:
        PrunerError: the two models are swapped, or have different vocabularies or hidden sizes; ``kept`` does not
            fit; the calibration set is too small or not for this model; or no projection has a bias to move.

    Example:
        >>> import torch, llm_pruner as lp
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        ...                      num_attention_heads=2)
        >>> model = LlamaForCausalLM(config).eval()
        >>> graph = lp.trace(model)
        >>> plan = lp.select(graph, lp.score(model, graph, criterion="l2"), ratio=0.5, kinds=("neurons",))
        >>> pruned = lp.apply(model, plan)
        >>> report = lp.compensate(model, pruned, torch.randint(64, (32, 8)))
        >>> [refit.module for refit in report.layers][:2]
        ['model.layers.0.self_attn.o_proj', 'model.layers.0.mlp.down_proj']
    """
    if method not in METHODS:
        raise PrunerError(f"compensation {method!r} is not valid: choose from {', '.join(METHODS)}")
    stacks = cut_stacks(model, pruned, kept)
    calibration = check_calibration(model, calibration)
    _check_pair(model, pruned)
    if len(calibration) < MIN_SAMPLES:
        raise PrunerError(f"compensation needs at least {MIN_SAMPLES} calibration samples, not {len(calibration)}")
    with exact_arithmetic(native_compute(pruned).device):
        projections = [added_projections(pruned, calibration, stack.ours) for stack in stacks]
    if method == "bias" and not any(
        _bias(stack.ours[i].get_submodule(one.name)) is not None
        for stack, added in zip(stacks, projections, strict=True)
        for i, of_layer in enumerate(added)
        for one in of_layer
    ):
        raise PrunerError("no projection whose output is added to the stream has a bias: use least_squares")
    batches = [own_share(batch) for batch in calibration.split(SAMPLES_PER_PASS)]
    last, earlier = unfinished.read(), 0
    report = CompensationReport([Refit(**refit) for refit in last.record["layers"]] if last else [])
    for stack, added in zip(stacks, projections, strict=True):  # a decoder reads what the encoder before it gives
        done = last.record["done"] - earlier if last else 0
        if last and done >= len(stack.ours):
            restore_layers(last, pruned, stack.path)
        else:
            work = _StackRefit(model, pruned, stack, added, only_bias=method == "bias")
            work.run(batches, report, last=last if done > 0 else None, earlier=earlier, unfinished=unfinished)
        earlier += len(stack.ours)
    report.temperature = scale_logits(model, pruned, calibration[-TEMPERATURE_SAMPLES:])
    return report


@dataclass(frozen=True)
class _StackRefit:
    """The refit of one stack of layers.

    Attributes:
        added: projections of each layer whose output is added to the stream.
    """

    model: PreTrainedModel
    pruned: PreTrainedModel
    stack: MatchingStack
    added: list[list[Projection]]
    only_bias: bool

    def run(
        self,
        batches: list[Inputs],
        report: CompensationReport,
        *,
        last: Kept | None,
        earlier: int,
        unfinished: Unfinished,
    ) -> None:
        """Refit the layers in order, and add the outcomes to the report.

        Args:
            last: what a run that was stopped within this stack left.
            earlier: number of layers of earlier stacks.
        """
        stack = self.stack
        with evaluating(self.model), evaluating(self.pruned), computing(self.model), computing(self.pruned):
            before = ResidualStream(self.model, stack.theirs, batches)
            after = ResidualStream(self.pruned, stack.ours, batches)
            if before.hidden[0].shape != after.hidden[0].shape:
                raise PrunerError("compensation compares hidden states, and the pruned model's are narrower")
            if last:
                restore_layers(last, self.pruned, stack.path, after)
            for i, targets in walk_original(before, stack, track(self.added, "compensating layers")):
                if last and earlier + i < last.record["done"]:
                    continue
                for refit in _refit_layer(self.pruned, after, i, targets, self.added[i], only_bias=self.only_bias):
                    refit.module = f"{stack.path}.{i}.{refit.module}"
                    report.layers.append(refit)
                moved = [refit.module for refit in report.layers if refit.ridge is not None]
                record = {"done": earlier + i + 1, "layers": [asdict(refit) for refit in report.layers]}
                keep_layers(unfinished, self.pruned, moved, stream=after, record=record)


def _check_pair(model: PreTrainedModel, pruned: PreTrainedModel) -> None:
    """Refuse models of different vocabularies, and a pruned model that is larger than the original."""
    tokens = [token_count(m) for m in (model, pruned)]
    sizes = [sum(p.numel() for p in m.parameters()) for m in (model, pruned)]
    if tokens[0] != tokens[1]:
        raise PrunerError(f"compensation needs one vocabulary, and these have {tokens[0]} and {tokens[1]} tokens")
    if sizes[0] < sizes[1]:
        raise PrunerError("the pruned model is larger than the original: give the original first")


def _bias(module: nn.Module) -> torch.Tensor | None:
    return cast("torch.Tensor | None", module.bias)


Targets = dict[str, list[torch.Tensor]]  # by projection and batch; the stream behind the layer is under ""


def walk_original(
    stream: ResidualStream, stack: MatchingStack, added: Iterable[list[Projection]]
) -> Iterator[tuple[int, Targets]]:
    """Advance the original over its layers; yield each layer of the pruned model with the targets of its projections.

    The last projection before a gap aims at the stream behind the dropped layers. A sum that is normalised aims at the
    layer's own: that of a dropped layer is read by a norm with other weights.

    Args:
        added: projections of each layer whose output is added to the stream.
    """
    for dropped in range(stack.kept[0]):
        stream.advance(dropped, [])
    for i, (layer, last, projections) in enumerate(zip(stack.kept, stack.last, added, strict=True)):
        targets = stream.advance(layer, projections)
        for dropped in range(layer + 1, last + 1):
            stream.advance(dropped, [])
            targets |= {one.name: list(stream.hidden) for one in projections[-1:] if not one.norm_reads_sum}
        yield i, targets | {"": list(stream.hidden)}


def _refit_layer(
    pruned: PreTrainedModel,
    stream: ResidualStream,
    layer: int,
    targets: Targets,
    added: list[Projection],
    *,
    only_bias: bool,
) -> list[Refit]:
    """Refit the projections of a layer in order, and the experts behind them; advance the stream over the layer."""
    refits, moved = [], None
    for one in added:
        refit, moved = _refit_projection(stream, layer, one, targets=targets, added=added, only_bias=only_bias)
        refits.append(refit)
    experts = [] if only_bias else _refit_experts(pruned, stream, layer, targets[""])
    if moved is None or experts:
        stream.advance(layer, [])
    else:  # nothing has changed since the last projection moved
        stream.hidden = moved
    return refits + experts


def _refit_projection(
    stream: ResidualStream,
    layer: int,
    one: Projection,
    *,
    targets: Targets,
    added: list[Projection],
    only_bias: bool,
) -> tuple[Refit, list[torch.Tensor] | None]:
    """Refit a projection; return the outcome, and the stream behind the layer if the projection is added last.

    None stands for a stream that follows from running the layer again, as where weights are rounded to 16 bits, or
    the hidden states do not fit in memory.
    """
    module = stream.layers[layer].get_submodule(one.name)
    keep = module.weight.dtype not in NARROW
    observed = observe(stream, layer, one, added, targets=targets, only_bias=only_bias, keep=keep)
    refit, change = _move(one.name, module, observed.fitted, observed.held_out)
    return refit, observed.moved(change)


@dataclass(frozen=True, kw_only=True)
class Observed:
    """A projection on all batches.

    Attributes:
        fitted: sums of its regression.
        held_out: sums that choose the ridge.
        reads: its inputs, with one of 1 for a bias, by batch; empty if the stream behind the layer is not kept.
        streams: the stream behind the layer, by batch.
    """

    fitted: RegressionSums
    held_out: RegressionSums
    reads: list[torch.Tensor] = field(default_factory=list)
    streams: list[torch.Tensor] = field(default_factory=list)

    def moved(self, change: torch.Tensor | None) -> list[torch.Tensor] | None:
        """Return the stream behind the layer after a change ``[inputs, hidden]`` of the weight; None if not kept."""
        if change is not None:
            with exact_arithmetic(change.device):
                for i, read in enumerate(self.reads):
                    stream = self.streams[i]
                    moved = read.float() @ self.fitted.compared(change.float())
                    self.streams[i] = stream + moved.view(stream.shape).to(stream)
        return self.streams or None


def observe(
    stream: ResidualStream,
    layer: int,
    one: Projection,
    added: list[Projection],
    *,
    targets: Targets,
    only_bias: bool = False,
    keep: bool = True,
    without: torch.Tensor | None = None,
) -> Observed:
    """Run a layer on all batches for the regression of one of its added projections.

    Args:
        keep: keep the stream behind the layer if the projection is added last, and there is room for it.
        without: weight ``[inputs, hidden]`` whose output is taken away from the stream first.
    """
    floor, factors = median_power(targets[one.name if one.norm_reads_sum else ""]), stream.factors(layer, one)
    observed = Observed(fitted=RegressionSums(floor, factors), held_out=RegressionSums(floor, factors))
    channels = slice(None)
    if only_bias:
        channels = slice(0) if _bias(stream.layers[layer].get_submodule(one.name)) is None else slice(-1, None)
    keep = keep and one is added[-1] and not one.norm and not stream.is_large
    for i, target in enumerate(targets[one.name]):
        reads, behind = stream.run_noting(layer, i, added)
        read, hidden = reads[one.name][..., channels], behind[one.name]
        if without is not None:
            with exact_arithmetic(read.device):
                hidden = hidden.float() - (read.float() @ observed.fitted.compared(without.float())).view(hidden.shape)
        (observed.held_out if i % HELD_OUT == HELD_OUT - 1 else observed.fitted).add(
            read, stream.on_device(target), hidden
        )
        if keep:
            observed.reads.append(read)
            observed.streams.append(behind[""])
    for sums in (observed.fitted, observed.held_out):
        sums.average()
    return observed


def _refit_experts(
    pruned: PreTrainedModel, stream: ResidualStream, layer: int, targets: list[torch.Tensor]
) -> list[Refit]:
    """Refit the down projections of the experts of a layer, whose output is added to the stream."""
    refits = []
    with implementations(pruned, experts="eager"):  # that shows what each of them reads
        for name, factor in added_experts(stream, layer).items():
            floor = median_power(targets)
            done = refit_experts(pruned, stream, layer, name, factor=factor, targets=targets, floor=floor)
            refits.append(Refit(name, done.before, done.after, done.ridge))
    return refits


def median_power(hidden: list[torch.Tensor]) -> float:
    """Return the median over tokens of the squared norm of hidden states."""
    return gathered(torch.cat([h.float().square().sum(-1).flatten() for h in hidden])).median().item()


def _move(
    name: str, module: nn.Module, fitted: RegressionSums, held_out: RegressionSums
) -> tuple[Refit, torch.Tensor | None]:
    """Move a projection's weight and bias by the regression whose lambda does best on held-out tokens, if any helps.

    Returns:
        The outcome, and the change ``[inputs, hidden]``, a bias last; None if there is none.
    """
    before = held_out.error / held_out.tokens
    if not fitted.inputs.numel():
        return Refit(name, before, before, None), None
    best, gain = best_ridge(fitted, held_out)
    if not gain > 0:
        return Refit(name, before, before, None), None
    change = (fitted + held_out).solve(best)
    bias = _bias(module)
    of_weight = change if bias is None else change[:-1]
    if bias is not None:
        bias.add_(change[-1].to(bias))
    if len(of_weight):
        weight = cast(torch.Tensor, module.weight)
        weight.add_((of_weight if isinstance(module, Conv1D) else of_weight.T).to(weight))
    return Refit(name, before, (held_out.error - gain) / held_out.tokens, best), change
