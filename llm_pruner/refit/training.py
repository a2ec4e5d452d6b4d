"""Parts that the trainings of a refit share: batches, the schedule, float32 copies, training of weights together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import PrunerError
from ..models.blockwise import native_compute
from ..models.dispatch import free_bytes
from ..models.inputs import Inputs, tokens_per_sample
from ..models.processes import averaged, count, mean_of, own_share
from ..models.skeleton import parameter_count
from ..progress import Step
from ..unfinished import NOTHING_KEPT, Kept, Unfinished
from .budget import Budget, Spending

BETAS = (0.9, 0.95)  # of Adam: the second moment forgets soon, since trainings have few steps
USUAL_WIDTH = 512
WARMUP = 0.05  # share of the budget in which the learning rate rises
HELD_OUT = 16  # one sample of so many, and at most so many, measure the result
TOKENS_PER_STEP = 512
OTHERS_PER_STEP = 8  # samples of images or sounds
LARGEST_GRADIENT = 1.0
BYTES_PER_TRAINED = 16  # float32: its gradient, two moments, and the value to go back to


@dataclass
class TrainingReport:
    """Outcome of a training of weights together.

    Attributes:
        tokens: tokens trained on.
        steps: steps of the optimizer.
        before: loss on held-out samples before the training.
        after: loss on held-out samples after the training.
    """

    tokens: int
    steps: int
    before: float
    after: float


def rate_for(model: PreTrainedModel, rate: float) -> float:
    """Return the peak learning rate of a model: ``rate`` up to 512 hidden channels, and less for more.

    Adam moves every weight by about the learning rate, and outputs by that times the number of inputs (Yang et al.,
    arXiv 2203.03466).
    """
    width = getattr(model.config.get_text_config(), "hidden_size", None)
    return rate * min(1.0, USUAL_WIDTH / width) if isinstance(width, int) else rate


def learning_rate(peak: float, share: float) -> float:
    """Return the learning rate at a share of the budget: a linear rise, then a cosine down to 0.

    >>> [round(learning_rate(1.0, share), 3) for share in (0.0, 0.025, 0.05, 0.525, 1.0)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    if share < WARMUP:
        return peak * share / WARMUP
    return peak * 0.5 * (1 + math.cos(math.pi * (share - WARMUP) / (1 - WARMUP)))


def hold_out(calibration: Inputs, samples: int) -> tuple[Inputs, Inputs]:
    """Split a calibration set in two: the samples to train on, and so many others.

    These are spread evenly over token ids, which may come from several texts, and the last of other inputs.

    >>> hold_out(torch.arange(12).view(6, 2), 2)[1].tolist()
    [[4, 5], [10, 11]]
    """
    total = len(calibration)
    if not isinstance(calibration, torch.Tensor):
        return calibration[: total - samples], calibration[total - samples :]
    is_held_out = torch.zeros(total, dtype=torch.bool)
    is_held_out[[(i + 1) * total // samples - 1 for i in range(samples)]] = True
    return calibration[~is_held_out], calibration[is_held_out]


def endless_batches(inputs: Inputs, samples: int, seed: int) -> Iterator[Inputs]:
    """Yield batches of an endless row of epochs, each in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        if isinstance(inputs, torch.Tensor):
            yield from inputs[torch.randperm(len(inputs), generator=generator).to(inputs.device)].split(samples)
        else:
            batches = inputs.split(samples)
            yield from (batches[i] for i in torch.randperm(len(batches), generator=generator).tolist())


def tokens_in(inputs: Inputs) -> int:
    """Return the number of tokens of a batch, or an estimate for images and sounds."""
    return len(inputs) * tokens_per_sample(inputs)


@contextmanager
def in_float32(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Let parameters be trained in float32; afterwards each has its own dtype again, and no gradient.

    Small steps of the optimizer would be lost in 16 bits.
    """
    trained = [p for p in parameters if p.is_floating_point()]
    states = [(p.dtype, p.requires_grad) for p in trained]
    try:
        for parameter in trained:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        yield trained
    finally:
        for parameter, (dtype, requires_grad) in zip(trained, states, strict=True):
            parameter.grad = None
            parameter.data = parameter.data.to(dtype)
            parameter.requires_grad_(requires_grad)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Let no parameter of a model require gradients; afterwards those do that did."""
    states = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, requires_grad in states:
            parameter.requires_grad_(requires_grad)


def check_memory(pruned: PreTrainedModel, trained: int, widened: int) -> None:
    """Refuse a training that would run out of memory, before it begins.

    Args:
        trained: number of trained parameters.
        widened: bytes by which weights grow in float32.

    Raises:
        PrunerError: as above.
    """
    device = native_compute(pruned).device
    needed, free = BYTES_PER_TRAINED * trained + widened, free_bytes(device)
    if needed > free:
        raise PrunerError(
            f"training {parameter_count(pruned):,} parameters needs {needed / 2**30:.1f} GiB more for float32 weights, "
            f"gradients and moments, and {free / 2**30:.1f} are free on {device}: use --refit blocks, which trains one "
            "block at a time, or ridge"
        )


def train_together(
    pruned: PreTrainedModel,
    trained: list[nn.Parameter],
    loss: Callable[[Inputs], torch.Tensor],
    calibration: Inputs,
    *,
    budget: Budget,
    rate: float,
    seed: int,
    epochs: float | None = None,
    unfinished: Unfinished = NOTHING_KEPT,
) -> TrainingReport:
    """Train parameters until the budget is spent; where the held-out loss did not fall, they are as before.

    Args:
        loss: mean loss of a batch.
        calibration: a sixteenth is held out, at most 16 samples; the others are repeated if the budget is larger.
        rate: peak learning rate of models of up to 512 hidden channels.
        seed: of the order of the samples.
        epochs: read the samples at most so often, even where the budget is larger.
        unfinished: keeps weights and the state of the optimizer, and has those of a run that was stopped.

    Raises:
        PrunerError: there are fewer than 16 samples.
    """
    fitted, held_out = hold_out(calibration, min(len(calibration) // HELD_OUT, HELD_OUT))
    if not len(held_out):
        raise PrunerError(f"a training needs at least {HELD_OUT} calibration samples, not {len(calibration)}")
    samples = OTHERS_PER_STEP
    if isinstance(calibration, torch.Tensor):
        samples = max(1, TOKENS_PER_STEP // calibration.shape[1])
    device = native_compute(pruned).device
    held_out = held_out.to(device)

    @torch.no_grad()
    def held_out_loss() -> float:
        return sum(loss(batch).item() * len(batch) for batch in held_out.split(samples)) / len(held_out)

    before, start = held_out_loss(), [parameter.detach().clone() for parameter in trained]
    spending = Spending(budget if epochs is None else budget.at_most(round(epochs * tokens_in(fitted))))
    batches = endless_batches(fitted.to(device), samples, seed)
    descent = Descent(trained, spending, peak=rate_for(pruned, rate), unfinished=unfinished)
    descent.run(loss, batches)
    after = held_out_loss()
    if not after < before:
        for parameter, value in zip(trained, start, strict=True):
            parameter.data.copy_(value)
    return TrainingReport(spending.tokens, descent.steps, before, after)


def average_gradients(parameters: Iterable[torch.Tensor]) -> None:
    """Average gradients over the processes, each of which has those of its own samples."""
    if count() > 1:
        for parameter in parameters:
            parameter.grad = averaged(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)


class Descent:
    """Steps of the optimizer on parameters, which begin where a run that was stopped ended.

    Attributes:
        steps: steps so far.
    """

    def __init__(self, trained: list[nn.Parameter], spending: Spending, *, peak: float, unfinished: Unfinished):
        self.trained, self.spending, self.peak, self.unfinished = trained, spending, peak, unfinished
        self.optimizer = torch.optim.Adam(trained, lr=peak, betas=BETAS, fused=True)
        self.steps = 0
        if kept := unfinished.read():
            self._take_over(kept)

    def run(self, loss: Callable[[Inputs], torch.Tensor], batches: Iterator[Inputs]) -> None:
        """Train until the budget is spent, or the loss is not finite.

        Args:
            batches: all that the training reads, those of earlier steps among them.
        """
        for _ in range(self.steps):
            next(batches)
        parts = 100
        with Step("training, percent of the budget", parts) as progress:
            while self.spending.share < 1:
                batch = next(batches)
                mean = loss(own_share(batch) if len(batch) % count() == 0 else batch)
                if not math.isfinite(mean_of(mean.item())):
                    break
                self.spending.tokens += tokens_in(batch)
                self._step(mean)
                progress.done, progress.note = int(parts * self.spending.share), f"loss {mean.item():.3f}"
                if self.unfinished.due:
                    self._keep()

    def _step(self, loss: torch.Tensor) -> None:
        loss.backward()
        average_gradients(self.trained)
        nn.utils.clip_grad_norm_(self.trained, LARGEST_GRADIENT)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.peak, self.spending.share)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1

    def _keep(self) -> None:
        tensors: dict[str, torch.Tensor] = {}
        for i, parameter in enumerate(self.trained):
            state = self.optimizer.state.get(parameter, {})
            tensors |= {f"{i}": parameter} | {f"{i}.{name}": value for name, value in state.items()}
        record = {"steps": self.steps, "tokens": self.spending.tokens, "seconds": self.spending.seconds}
        self.unfinished.write(tensors, record)

    def _take_over(self, kept: Kept) -> None:
        self.steps, self.spending.tokens = kept.record["steps"], kept.record["tokens"]
        self.spending.started -= kept.record["seconds"]
        for key, tensor in kept.tensors.items():
            i, _, name = key.partition(".")
            parameter = self.trained[int(i)]
            if name:
                self.optimizer.state[parameter][name] = tensor.to(parameter.device)
            else:
                parameter.data.copy_(tensor)
