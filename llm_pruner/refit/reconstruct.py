"""Block-wise reconstruction: train the blocks of a pruned model, one after the other, to give the original's output.

With the original's residual stream h and the pruned model's stream p in front of a block f, and h' the original's
stream behind it, all weights of the block, norms too, are trained to minimise

    sum_t v_t |h'_t - f(p_t)|^2

over the calibration tokens t (BRECQ, arXiv 2102.05426; block-wise local distillation of Puzzle, arXiv 2411.19146). The
weight v_t is 1 / |h'_t|^2, but none weighs more than a token of median norm. Since p carries the errors of all earlier
blocks, each block also corrects those. Held-out samples decide which epoch's weights stay.

Only the block in training, its optimizer and the streams are in memory: the others may be offloaded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

import torch
from transformers import PreTrainedModel

from ..errors import PrunerError
from ..models.arithmetic import narrow_arithmetic
from ..models.blockwise import StandIns, computing, native_compute, standing_in
from ..models.inputs import Inputs
from ..models.processes import count, mean_of, own_share
from ..models.running import evaluating
from ..models.tasks import predicts_tokens
from ..progress import track
from ..selection.plan import PruningPlan
from ..unfinished import NOTHING_KEPT, Kept, Unfinished
from .budget import Budget, Spending
from .compensate import median_power, walk_original
from .layer_by_layer import keep_layers, restore_layers
from .matching import MatchingStack, matching_stacks
from .stream import Projection, ResidualStream
from .temperature import scale_logits
from .training import BETAS, average_gradients, learning_rate, rate_for, tokens_in

SAMPLES_PER_STEP = 8
HELD_OUT = 4  # every 4th batch decides which weights stay
RATE = 1e-3  # up to 512 hidden channels
PATIENCE = 2  # epochs without a gain on held-out samples that end the second half of a block's training
TEMPERATURE_SAMPLES = 32


@dataclass
class BlockRefit:
    """Outcome for one block.

    Attributes:
        module: path of the block.
        before: relative squared error of the stream behind it on held-out samples, before its training.
        after: the same error after its training.
        tokens: tokens that it was trained on.
    """

    module: str
    before: float
    after: float
    tokens: int


@dataclass
class ReconstructReport:
    """Outcome of :func:`reconstruct`.

    Attributes:
        blocks: outcome for every block, in order.
        temperature: factor of the logits; None if no weight scales them.
    """

    blocks: list[BlockRefit] = field(default_factory=list)
    temperature: float | None = None


@torch.no_grad()
def reconstruct(
    model: PreTrainedModel,
    pruned: PreTrainedModel,
    calibration: Inputs,
    budget: Budget,
    *,
    plan: PruningPlan | None = None,
    seed: int = 0,
    unfinished: Unfinished = NOTHING_KEPT,
) -> ReconstructReport:
    """Train the blocks of ``pruned`` in place, one after the other, towards the outputs of those of ``model``.

    Args:
        model: original model, which stays as it is.
        pruned: pruned model.
        calibration: LongTensor ``[samples, tokens]`` or other inputs; a quarter is held out.
        budget: tokens that each block is trained on, or minutes for all of them.
        plan: plan of the pruned model; needed if it lost layers or hidden channels.
        seed: of the order of the batches.
        unfinished: keeps the blocks that are done, and has those of a run that was stopped.

    Raises:
        PrunerError: there are too few samples, or the models' layers do not match.
    """
    batches = [own_share(batch) for batch in calibration.split(SAMPLES_PER_STEP)]
    if len(batches) < HELD_OUT:
        least = SAMPLES_PER_STEP * (HELD_OUT - 1) + 1
        raise PrunerError(f"reconstruction needs at least {least} calibration samples, not {len(calibration)}")
    stacks = matching_stacks(model, pruned, plan)
    budget = Budget(
        tokens=budget.tokens,
        minutes=None if budget.minutes is None else budget.minutes / sum(len(stack.ours) for stack in stacks),
    )
    kept = unfinished.read()
    report = ReconstructReport([BlockRefit(**block) for block in kept.record] if kept else [])
    earlier = 0  # blocks of earlier stacks
    for stack in stacks:  # the second stack of an encoder-decoder reads the output of the first
        done = len(report.blocks) - earlier
        earlier += len(stack.ours)
        if kept is not None and done >= len(stack.ours):
            restore_layers(kept, pruned, stack.path)
        else:
            trainer = BlockTrainer(model, pruned, stack, batches=batches, seed=seed)
            trainer.train(budget, report.blocks, kept if done else None, unfinished)
    if predicts_tokens(pruned):
        report.temperature = scale_logits(model, pruned, calibration[-TEMPERATURE_SAMPLES:])
    return report


class BlockTrainer:
    """Trains the blocks of one stack."""

    def __init__(
        self, model: PreTrainedModel, pruned: PreTrainedModel, stack: MatchingStack, *, batches: list[Inputs], seed: int
    ):
        self.model, self.pruned, self.stack, self.batches = model, pruned, stack, batches
        self.compute = native_compute(pruned)
        self.tokens = [count() * tokens_in(batch) for batch in batches]
        self.seed = seed
        self.peak = rate_for(pruned, RATE)
        self._trained: dict[str, torch.Tensor] = {}  # tensors of the block in training, by name

    def _stand_in(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        trained = self._trained.get(name)
        return self.compute.convert(tensor) if trained is None else trained

    def train(self, budget: Budget, refits: list[BlockRefit], kept: Kept | None, unfinished: Unfinished) -> None:
        """Train the blocks in order; each has the budget.

        Args:
            refits: outcomes of earlier stacks, and of blocks that a run that was stopped had done; new ones are added.
            kept: what such a run left of this stack.
        """
        stack = self.stack
        with (
            evaluating(self.model),
            evaluating(self.pruned),
            computing(self.model),
            standing_in(self.pruned, self._stand_in),
        ):
            before = ResidualStream(self.model, stack.theirs, self.batches)
            after = ResidualStream(self.pruned, stack.ours, self.batches)
            done = 0
            if kept is not None:
                restore_layers(kept, self.pruned, stack.path, after)
                done = sum(refit.module.startswith(f"{stack.path}.") for refit in refits)
            no_projections: list[list[Projection]] = [[] for _ in stack.ours]
            for i, behind in walk_original(before, stack, track(no_projections, "reconstructing blocks")):
                if i < done:
                    continue
                targets = [stack.comparable(h, p) for h, p in zip(behind[""], after.hidden, strict=True)]
                if any(target is None for target in targets):
                    raise PrunerError("the pruned model's hidden states are narrower: give plan, which names channels")
                refits.append(self._train_block(after, i, targets, budget))  # type: ignore[arg-type]
                after.advance(i, [])
                record = [asdict(refit) for refit in refits]
                keep_layers(unfinished, self.pruned, [one.module for one in refits], stream=after, record=record)

    def _train_block(self, stream: ResidualStream, i: int, targets: list[torch.Tensor], budget: Budget) -> BlockRefit:
        """Train one block; keep the weights of the epoch that is best on held-out batches."""
        path = f"{self.stack.path}.{i}"
        block = Block(stream, i, targets, floor=max(median_power(targets), 1e-12))
        fitted = [b for b in range(len(targets)) if b % HELD_OUT != HELD_OUT - 1]
        held_out = [b for b in range(len(targets)) if b % HELD_OUT == HELD_OUT - 1]
        first = best = block.error(held_out)
        generator = torch.Generator().manual_seed(self.seed + i)
        spending = Spending(budget)
        with self._trainable(path) as tensors:
            kept = [tensor.detach().clone() for tensor in tensors]
            optimizer = torch.optim.Adam(tensors, betas=BETAS) if tensors else None
            since = 0
            while optimizer and best > 0 and spending.share < 1 and (since < PATIENCE or spending.share < 0.5):
                order = torch.randperm(len(fitted), generator=generator).tolist()
                for b in (fitted[j] for j in order):
                    spending.tokens += self.tokens[b]
                    _step(block, b, optimizer, learning_rate(self.peak, spending.share))
                    if spending.share == 1:
                        break
                since += 1
                if (error := block.error(held_out)) < best:
                    best, since = error, 0
                    kept = [tensor.detach().clone() for tensor in tensors]
            for tensor, value in zip(tensors, kept, strict=True):
                tensor.copy_(value)
        return BlockRefit(path, first, best, spending.tokens)

    @contextmanager
    def _trainable(self, path: str) -> Iterator[list[torch.Tensor]]:
        """Let float32 copies of a block's parameters stand in for them; write them back afterwards.

        A block that shares tensors with others has none to train.
        """
        stand_ins = StandIns(self.pruned, self._stand_in)
        names = stand_ins.names(path) if path in stand_ins.blocks else set()
        parameters = {n: p for n, p in self.pruned.named_parameters() if n in names and p.is_floating_point()}
        self._trained = {
            name: self.compute.convert(p).float().clone().requires_grad_() for name, p in parameters.items()
        }
        try:
            yield list(self._trained.values())
            for name, parameter in parameters.items():
                parameter.copy_(self._trained[name])
        finally:
            self._trained = {}


class Block:
    """A block of the pruned model, the streams that it reads, and their targets, batch by batch."""

    def __init__(self, stream: ResidualStream, index: int, targets: list[torch.Tensor], floor: float):
        self.stream, self.index, self.targets, self.floor = stream, index, targets, floor

    def loss(self, batch: int) -> torch.Tensor:
        """Return the mean over tokens of the weighted squared error behind the block."""
        target = self.stream.on_device(self.targets[batch]).float()
        output = self.stream.run(self.index, batch, self.stream.hidden[batch]).float()
        weights = 1 / target.square().sum(-1).clamp_min(self.floor)
        return (weights * (target - output).square().sum(-1)).mean()

    def error(self, batches: list[int]) -> float:
        """Return the mean loss over batches."""
        return mean_of(sum(self.loss(batch).item() for batch in batches) / len(batches))


def _step(block: Block, batch: int, optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Take one step of the optimizer at a learning rate, unless the loss is not finite."""
    with torch.enable_grad():
        with narrow_arithmetic(block.stream.device):
            loss = block.loss(batch)
        if not math.isfinite(mean_of(loss.item())):
            return
        loss.backward()
    average_gradients(optimizer.param_groups[0]["params"])
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()
