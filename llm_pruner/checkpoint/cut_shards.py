"""Cut the stored tensors of a checkpoint by a plan and write them file by file, quantized ones as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ..errors import PrunerError
from ..models.skeleton import canonical_names
from ..progress import Step
from ..selection.plan import PruningPlan, name_after
from .boxes import Box, numbers_in, with_numbers
from .quantized.registry import OF_CACHE, QuantizedShards
from .quantized.weights import Part, Weight, cut_part, part_positions
from .shards import SINGLE, Shards, ShardWriter, TensorType, write_index


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A tensor to write: its name, dtype and shape, the file that it comes from, and how to make it."""

    name: str
    type: TensorType
    file: Path
    make: Callable[[], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class CutCheckpoint:
    """A checkpoint to cut: its files, the places of its tensors in the model, the plan, and the pruned model's shapes.

    Attributes:
        dequantized: dtype to write quantized weights in; None to slice them as they are stored.
    """

    plan: PruningPlan
    shards: Shards
    boxes: Mapping[str, Box]
    model: PreTrainedModel
    pruned: PreTrainedModel
    dequantized: torch.dtype | None = None

    def cuts(self) -> Iterator[Cut]:
        """Yield the tensors to write.

        Raises:
            InsideBlock: the plan keeps a part of what a quantized weight stores as one number.
            PrunerError: a tensor has another shape than the pruned model.
        """
        canonical = canonical_names(self.model)
        own = {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}
        expected = {name: tuple(tensor.shape) for name, tensor in self.pruned.state_dict().items()}
        for name, box in self.boxes.items():
            after, known = name_after(box.parameter, self.plan), canonical[box.parameter]
            kept = box.kept(self.plan, known)
            if after is None or kept is None:
                continue
            shape = box.shape if box.is_whole else own[box.parameter]
            self._check_shape(name, box, self.plan.cut_shape(known, shape), expected[after])
            numbers = numbers_in(after) + box.numbers_after(self.plan, known)
            yield from self._cuts_of(name, box, kept, numbers)
        yield from self._scales_of_cache()

    def renamed(self) -> dict[str, str | None]:
        """Return the new name of every module that holds stored tensors, None for a removed one."""
        canonical = canonical_names(self.model)
        names: dict[str, str | None] = {}
        for name, box in self.boxes.items():
            after, known = name_after(box.parameter, self.plan), canonical[box.parameter]
            kept = None if after is None else box.kept(self.plan, known)
            numbers = [] if after is None else numbers_in(after) + box.numbers_after(self.plan, known)
            module = name
            while "." in module:
                module = module.rpartition(".")[0]
                if kept is not None:
                    names[module] = with_numbers(module, numbers)
                else:
                    names.setdefault(module, None)
        return names

    def _check_shape(self, name: str, box: Box, cut: tuple[int, ...], expected: tuple[int, ...]) -> None:
        if cut != expected:
            raise PrunerError(
                f"{name} in {self.shards.folder} is {list(box.shape)} and would become {list(cut)}; the pruned model "
                f"has {list(expected)}: config and weights do not belong together"
            )

    def _cuts_of(self, name: str, box: Box, kept: dict[int, torch.Tensor], numbers: list[int]) -> Iterator[Cut]:
        """Yield what is written for a stored tensor, or for all stored tensors of a quantized weight.

        Names stay as the files have them but for their numbers, since other engines know those alone.
        """
        shards, shape = self.shards, tuple(len(kept[d]) if d in kept else s for d, s in enumerate(box.shape))
        if not isinstance(shards, QuantizedShards) or name not in shards.weights:
            place, new = shards.tensors[name], with_numbers(name, numbers)
            yield Cut(name=new, type=(place.dtype, shape), file=place.file, make=partial(self._plain, name, kept))
            return
        weight = shards.weights[name]
        if self.dequantized is not None:
            file = shards.tensors[next(iter(weight.parts.values())).name].file
            make = partial(self._dense, name, kept)
            yield Cut(name=with_numbers(name, numbers), type=(self.dequantized, shape), file=file, make=make)
            return
        for part in weight.tensors:
            place = shards.tensors[part.name]
            positions = part_positions(weight, part, kept)
            cut_to = tuple(len(positions[d]) if d in positions else size for d, size in enumerate(place.shape))
            make = partial(self._sliced, weight, part, kept)
            new = with_numbers(part.name, numbers)
            yield Cut(name=new, type=(place.dtype, cut_to), file=place.file, make=make)

    def _scales_of_cache(self) -> Iterator[Cut]:
        """Yield the scales of cached keys and values, which go with their layers."""
        for name, place in self.shards.tensors.items():
            quantized = isinstance(self.shards, QuantizedShards) and self.dequantized is None
            if quantized and OF_CACHE.search(name) and (new := name_after(name, self.plan)) is not None:
                type_ = (place.dtype, place.shape)
                yield Cut(name=new, type=type_, file=place.file, make=partial(self.shards.read, name))

    def _plain(self, name: str, kept: dict[int, torch.Tensor]) -> torch.Tensor:
        return _select(self.shards.read(name, again=True), kept)

    def _dense(self, name: str, kept: dict[int, torch.Tensor]) -> torch.Tensor:
        assert self.dequantized is not None
        return _select(self.shards.values(name, self.dequantized), kept)

    def _sliced(self, weight: Weight, part: Part, kept: dict[int, torch.Tensor]) -> torch.Tensor:
        return cut_part(weight, part, self.shards.read(part.name, again=True), kept)


def _select(tensor: torch.Tensor, kept: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """Return the kept part of a tensor, always a copy."""
    for dim, positions in kept.items():
        tensor = tensor.index_select(dim, positions)
    return tensor.contiguous() if kept else tensor.clone()


def write_cuts(checkpoint: CutCheckpoint, folder: Path) -> dict[str, str]:
    """Cut and write file by file, with an index; return the SHA-256 of every new file.

    Raises:
        PrunerError: as :meth:`CutCheckpoint.cuts`, before anything is written.
    """
    by_file: dict[Path, list[Cut]] = {file: [] for file in checkpoint.shards.files}
    for cut in checkpoint.cuts():
        by_file[cut.file].append(cut)
    contents: dict[str, list[str]] = {}
    hashes: dict[str, str] = {}
    size = 0
    with Step("cutting tensors", sum(map(len, by_file.values()))) as step:
        for file, cuts in by_file.items():
            if not cuts:  # all of its layers went
                continue
            types = {cut.name: cut.type for cut in cuts}
            with ShardWriter(folder / file.name, types) as writer:
                for cut in cuts:
                    writer.save_tensor(cut.name, cut.make())
                    step.advance()
            hashes[file.name], contents[file.name] = writer.sha256, list(types)
            size += sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in types.values())
    if list(contents) != [SINGLE]:
        write_index(folder, contents, size)
    return hashes
