"""Safetensors checkpoints tensor by tensor, so that none has to fit into memory."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open

from ..errors import PrunerError
from ..files import read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Safetensors' names of the dtypes that transformers stores.
STORED_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in STORED_DTYPES.items()}
TensorType = tuple[torch.dtype, tuple[int, ...]]


@dataclass(frozen=True)
class Stored:
    """Place of a tensor: bytes ``start`` to ``end`` of its file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class Shards:
    """The tensors of a checkpoint folder, read one at a time.

    Attributes:
        files: shards, in the order of their names.
        tensors: place of every tensor by name, in the order of the files.

    Raises:
        PrunerError: the folder holds no safetensors, a file is missing, truncated or not safetensors, the index names
            a file outside the folder, or index and files disagree.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self.files, index = shard_files(self.folder)
        self.tensors: dict[str, Stored] = {}
        for file in self.files:
            for name, stored in tensors_in(file).items():
                if name in self.tensors:
                    raise PrunerError(f"the tensor {name} is in {self.tensors[name].file.name} and in {file.name}")
                self.tensors[name] = stored
        for name, file_name in index.items():
            place = self.tensors.get(name)
            if place is None or place.file.name != file_name:
                where = "no file" if place is None else place.file.name
                raise PrunerError(f"{self.folder / INDEX} looks for {name} in {file_name}; it is in {where}")

    def of(self, file: Path) -> dict[str, Stored]:
        """Return the tensors of one file."""
        return {name: stored for name, stored in self.tensors.items() if stored.file == file}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all tensors by name."""
        return {name: stored.shape for name, stored in self.tensors.items()}

    def values(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Read a tensor as it is stored; ``dtype`` is for weights that are stored in another form."""
        return self.read(name)

    def read(self, name: str, again: bool = False) -> torch.Tensor:
        """Read a tensor into memory; nothing stays mapped.

        Args:
            again: use memory that the next such call overwrites, which saves the allocation.
        """
        stored = self.tensors[name]
        size = stored.end - stored.start
        if again:
            self._buffer = self._buffer if len(self._buffer) >= size else torch.empty(size, dtype=torch.uint8)
            data = self._buffer[:size]
        else:
            data = torch.empty(size, dtype=torch.uint8)
        with stored.file.open("rb") as file:
            file.seek(stored.start)
            if file.readinto(cast(Any, data.numpy())) != size:
                raise PrunerError(f"{stored.file} ends within the tensor {name}")
        return (data.view(stored.dtype) if size else data.to(stored.dtype)).view(stored.shape)


def shard_files(folder: Path, name: str = INDEX) -> tuple[list[Path], dict[str, str]]:
    """Return the files of a checkpoint, and the file of each tensor by its index.

    Args:
        name: of the index.

    Raises:
        PrunerError: the folder holds no safetensors, a file is missing, or the index is damaged.
    """
    index = folder / name
    if not index.is_file():
        if not (folder / SINGLE).is_file():
            raise PrunerError(f"{folder} holds neither {SINGLE} nor {INDEX}; pickles are never read")
        return [folder / SINGLE], {}
    document = read_json(index)
    try:
        weight_map = document["weight_map"]
        names = sorted({str(name) for name in weight_map.values()})
        weight_map = {str(tensor): str(name) for tensor, name in weight_map.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise PrunerError(f"{index} is damaged: {type(error).__name__} {error}") from error
    for name in names:
        if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise PrunerError(f"{index} names {name!r}, which is not a safetensors file of the folder")
        if not (folder / name).is_file():
            raise PrunerError(f"{folder} lacks the shard {name} that its index names: the checkpoint is incomplete")
    if not names:
        raise PrunerError(f"{index} names no tensors")
    return [folder / name for name in names], weight_map


def tensors_in(file: Path) -> dict[str, Stored]:
    """Return the place of every tensor of a safetensors file.

    Raises:
        PrunerError: the file is damaged, or holds a tensor of a type that is not read.
    """
    try:
        with safe_open(str(file), "pt"):  # checks that the header is sound and the tensors fill the file
            pass
        with file.open("rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
            header = json.loads(raw.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise PrunerError(f"{file} is damaged or not a safetensors file: {error}") from error
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["dtype"] not in STORED_DTYPES:
            raise PrunerError(f"{name} in {file} has the type {entry['dtype']}, which cannot be sliced")
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        tensors[name] = Stored(file, STORED_DTYPES[entry["dtype"]], tuple(entry["shape"]), start, end)
    return tensors


class ShardWriter:
    """Write a safetensors file tensor by tensor, in a context; each is hashed and written while the next is made.

    Attributes:
        sha256: hash of the file, once the context has ended.

    Args:
        file: path to write.
        types: dtype and shape of every tensor, in the order in which they are saved.

    Example:
        >>> import tempfile, torch
        >>> from safetensors.torch import load_file
        >>> file = Path(tempfile.mkdtemp()) / "model.safetensors"
        >>> with ShardWriter(file, {"a": (torch.float32, (2,))}) as writer:
        ...     writer.save_tensor("a", torch.ones(2))
        >>> load_file(file)
        {'a': tensor([1., 1.])}
    """

    def __init__(self, file: Path, types: Mapping[str, TensorType]):
        self.sha256 = ""
        self._types = types
        self._missing = list(types)
        self._digest = hashlib.sha256()
        self._path = file
        self._thread = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def __enter__(self) -> ShardWriter:
        self._file = self._path.open("wb")
        head = _header_bytes(self._types)
        self._write(len(head).to_bytes(8, "little") + head)
        return self

    def save_tensor(self, name: str, tensor: torch.Tensor) -> None:
        """Write the next tensor; its memory must stay as it is until the next call."""
        if [name] != self._missing[:1] or (tensor.dtype, tuple(tensor.shape)) != self._types[name]:
            raise AssertionError(f"{name} ({tensor.dtype}, {list(tensor.shape)}) is not the next announced tensor")
        del self._missing[0]
        data = cast(Any, tensor.contiguous().view(-1).view(torch.uint8).numpy()) if tensor.numel() else b""
        self._wait()
        self._pending = self._thread.submit(self._write, data)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if error is None:
                self._wait()
                if self._missing:
                    raise AssertionError(f"{self._missing[0]} was announced and not saved")
                self._file.flush()
                os.fsync(self._file.fileno())
                self.sha256 = self._digest.hexdigest()
        finally:
            self._thread.shutdown()
            self._file.close()

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.result()

    def _write(self, data: Any) -> None:
        self._digest.update(data)
        self._file.write(data)


def _header_bytes(types: Mapping[str, TensorType]) -> bytes:
    """Return the JSON header of a safetensors file, padded to eight bytes."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in types.items():
        size = prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    head = json.dumps(header).encode()
    return head + b" " * (-len(head) % 8)


def write_index(folder: Path, contents: Mapping[str, Iterable[str]], total: int) -> None:
    """Write the index of a checkpoint of several files: the tensors of each, and bytes in all."""
    weight_map = {tensor: file for file, tensors in contents.items() for tensor in tensors}
    document = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
