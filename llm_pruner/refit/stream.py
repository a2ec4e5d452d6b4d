"""The residual stream between layers."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedModel

from ..errors import PrunerError, in_one_line
from ..models.blockwise import native_compute
from ..models.hooks import Forward, forward_hooks, replaced_forwards
from ..models.inputs import Inputs
from ..models.layers import HIDDEN, hidden_in, hidden_out
from ..models.processes import count, gathered
from ..models.running import forward
from ..peak_memory import give_back_memory
from ..progress import track
from .mapped import mapped, mapped_space

IN_MEMORY = 1 << 30  # bytes of the hidden states of a calibration set that stay in memory


@dataclass(frozen=True)
class Projection:
    """A projection of a layer whose output is added to the residual stream.

    Attributes:
        name: path in the layer.
        norm: path of a norm between the projection and the stream; "" where its output is added as it is.
        norm_reads_sum: the norm reads the sum with the stream, as in BERT; else the output alone, as in Gemma 2.
        factor: by which the output is multiplied before it is added, as in Granite.
    """

    name: str
    norm: str = ""
    norm_reads_sum: bool = False
    factor: float = 1.0

    @property
    def added(self) -> str:
        """Path of the module whose output is added to the stream."""
        return self.name if self.norm_reads_sum or not self.norm else self.norm


class _AllRecorded(Exception):
    """The last layer has been called: what comes behind it need not run."""


class ResidualStream:
    """Hidden states of a model in front of one of its layers, batch by batch, and the arguments of its layers.

    Layers that return the stream alone do not run while their arguments are recorded: these seldom depend on it, which
    is checked on the last batch.

    Attributes:
        layers: the model's layers.
        hidden: hidden states of every batch, in front of the first layer at first.
        is_large: the hidden states lie on disk (:mod:`llm_pruner.refit.mapped`), and so should what is as large.

    Raises:
        PrunerError: running the layers one after the other does not give the model's own output.
    """

    def __init__(self, model: PreTrainedModel, layers: nn.ModuleList, batches: list[Any]):
        self.layers = layers
        self.hidden: list[torch.Tensor] = []
        self._calls: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = []  # by batch and layer
        self.device = device = native_compute(model).device
        last, plain = self._run_whole(model, batches[-1].to(device))
        self.is_large = last.nbytes * len(batches) > IN_MEMORY
        for ids in track(batches, "recording the residual stream"):
            self._record(model, ids.to(device), calls=len(plain), runs=not all(plain))
        hidden = self.hidden[-1]
        try:
            for i in range(len(layers)):
                hidden = self.run(i, len(batches) - 1, hidden)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a layer of somebody else's model can fail in any way
            raise PrunerError(
                f"this model cannot be compensated: its layers do not run one by one: {in_one_line(error)}"
            ) from error
        if not torch.allclose(hidden.float(), last.float(), rtol=1e-3, atol=1e-4 * last.abs().max().item()):
            raise PrunerError("this model cannot be compensated: its layers pass on more than one stream")

    def _run_whole(self, model: PreTrainedModel, ids: Inputs) -> tuple[torch.Tensor, list[bool]]:
        """Run a batch; return the stream behind the last layer, and for every call if it returned the stream alone."""
        last: list[Any] = []
        plain: list[bool] = []

        def note(_: nn.Module, __: Any, output: Any) -> None:
            last[:] = [output]
            plain.append(isinstance(output, torch.Tensor))

        with forward_hooks([(layer, note) for layer in self.layers]):
            forward(model, ids)
        if not last:
            raise PrunerError("the calibration set does not reach all layers that were cut: give images or sounds")
        return hidden_out(last[0]), plain

    def _record(self, model: PreTrainedModel, ids: Inputs, *, calls: int, runs: bool) -> None:
        """Note the arguments that a batch gives every layer, and the stream before the first.

        Args:
            calls: of layers in a pass.
            runs: run the layers, not only what lies around them.
        """
        noted: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        first: list[torch.Tensor] = []

        def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            first.append(hidden_in(args, kwargs))
            del first[1:]
            others = {k: _no_cache(v) for k, v in kwargs.items() if k not in HIDDEN}
            noted.append((tuple(map(_no_cache, args[1:])), others))

        def replace(_: int, own: Forward) -> Forward:
            def run(*args: Any, **kwargs: Any) -> Any:
                if len(noted) == calls:
                    raise _AllRecorded
                return own(*args, **kwargs) if runs else hidden_in(args, kwargs)

            return run

        # Before all other hooks: a layer with hooks of its own is given what the model gives it.
        with (
            forward_hooks(before=[(layer, record) for layer in self.layers], with_kwargs=True, prepend=True),
            replaced_forwards(list(self.layers), replace),
            suppress(_AllRecorded),
        ):
            forward(model, ids)
        self._calls.append(noted)
        self.hidden += map(self.put, first)

    def put(self, states: torch.Tensor) -> torch.Tensor:
        """Return hidden states of a batch as they are kept: on disk if those of all batches are large."""
        if not self.is_large:
            return states
        give_back_memory()  # which freed states have left scattered
        return mapped(states)

    def on_device(self, states: torch.Tensor) -> torch.Tensor:
        """Return hidden states where the model computes, wherever :meth:`put` has left them."""
        return states.to(self.device) if self.is_large else states

    def join(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """Return what :meth:`put` has left, one after the other along the first dim, of all processes."""
        if not self.is_large:
            return gathered(torch.cat(parts))
        whole = mapped_space((sum(map(len, parts)), *parts[0].shape[1:]), parts[0].dtype)
        torch.cat(parts, out=whole)
        return whole if count() == 1 else gathered(self.on_device(whole))

    def run(self, layer: int, batch: int, hidden: torch.Tensor) -> torch.Tensor:
        """Run one layer on ``hidden``, with the other arguments of that batch."""
        args, kwargs = self._calls[batch][layer]
        return hidden_out(self.layers[layer](self.on_device(hidden), *args, **kwargs))

    def run_noting(
        self, layer: int, batch: int, projections: list[Projection]
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Run a layer on its batch; return the input of each projection, and the stream just behind each.

        Inputs have one more channel of 1 for a bias. Those of a projection whose output alone is normalised are divided
        by the same number as that output.

        Args:
            projections: added projections of the layer, in order. The stream behind the layer itself is under "".
        """
        reads: dict[str, torch.Tensor] = {}
        adds: dict[str, torch.Tensor] = {}
        block = self.layers[layer]
        sums: dict[str, torch.Tensor] = {}
        shares: dict[str, torch.Tensor] = {}  # that a norm leaves of what it reads, its weight aside

        def share(name: str) -> Any:
            def hook(norm: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
                read = (args[0].float() * _weight_of(norm, output)).norm(dim=-1, keepdim=True)
                shares[name] = (output.float().norm(dim=-1, keepdim=True) / read).nan_to_num(posinf=0)

            return hook

        def note(name: str) -> Any:
            def hook(_: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
                reads[name], adds[name] = args[0], output

            return hook

        normalized = [(block.get_submodule(one.norm), _keep_first(sums, one.name)) for one in projections if one.norm]
        modules = dict.fromkeys(name for one in projections for name in (one.name, one.added))
        hooks = [(block.get_submodule(name), note(name)) for name in modules]
        hooks += [(block.get_submodule(one.norm), share(one.norm)) for one in projections if one.added == one.norm]
        with forward_hooks(hooks, before=normalized):
            stream = self.run(layer, batch, self.hidden[batch])
        behind = {"": stream} | sums
        for one in reversed(projections):  # what comes later is added as it is, and can be taken away again
            if not one.norm_reads_sum:
                behind[one.name] = stream
                stream = stream - one.factor * adds[one.added].view(stream.shape)
            if getattr(block.get_submodule(one.name), "bias", None) is not None:
                reads[one.name] = torch.cat([reads[one.name], torch.ones_like(reads[one.name][..., :1])], -1)
            if one.added != one.name:
                reads[one.name] = reads[one.name] * shares[one.added].to(reads[one.name])
        return reads, behind

    def factors(self, layer: int, one: Projection) -> torch.Tensor:
        """Return the factors of a projection's output on its way to the stream: ``[1]``, or ``[outputs]`` of a norm."""
        if one.added == one.name:
            return torch.tensor([one.factor], device=self.device)
        weights: list[torch.Tensor] = []

        def note(norm: nn.Module, _: Any, output: torch.Tensor) -> None:
            weights[:] = [_weight_of(norm, output)]

        with forward_hooks([(self.layers[layer].get_submodule(one.norm), note)]):
            self.run(layer, 0, self.hidden[0])
        return one.factor * weights[0].to(self.device)

    def norm_inputs(self, layer: int, norms: list[str]) -> dict[str, torch.Tensor]:
        """Run a layer on its first batch; return what each of its norms reads, in the order in which they run."""
        block, read = self.layers[layer], dict[str, torch.Tensor]()
        with forward_hooks(before=[(block.get_submodule(name), _keep_first(read, name)) for name in norms]):
            self.run(layer, 0, self.hidden[0])
        return read

    def advance(self, layer: int, projections: list[Projection]) -> dict[str, list[torch.Tensor]]:
        """Move the stream behind ``layer``; return the stream behind each of its projections, batch by batch."""
        streams: dict[str, list[torch.Tensor]] = {one.name: [] for one in projections}
        for batch in range(len(self.hidden)):
            _, behind = self.run_noting(layer, batch, projections)
            self.hidden[batch] = self.put(behind[""])
            for name, kept in streams.items():
                kept.append(self.hidden[batch] if behind[name] is behind[""] else self.put(behind[name]))
        return streams


def _weight_of(norm: nn.Module, output: torch.Tensor) -> torch.Tensor:
    """Return what a norm multiplies by, from within the run of its layer, where its weight is at hand.

    It is what the norm makes of +1 and -1 in turn, of mean 0 and mean square 1.
    """
    signs = torch.ones_like(output[..., :1, :].flatten(0, -2)[0])
    signs[1::2] = -1
    return ((norm.forward(signs) - norm.forward(0 * signs)) * signs).float()


def _no_cache(value: Any) -> Any:
    """Return an argument of a layer, None for a cache, which would grow whenever the layer runs."""
    return None if isinstance(value, Cache) else value


def _keep_first(kept: dict[str, torch.Tensor], name: str) -> Any:
    """Return a hook before a forward that keeps its first argument under a name."""

    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
        if args:
            kept[name] = args[0]

    return hook
