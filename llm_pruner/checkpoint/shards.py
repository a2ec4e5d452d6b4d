"""Safetensors checkpoints tensor by tensor, so that none has to fit into memory."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open

from ..errors import PrunerError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
BLOCK = 2**24  # bytes hashed at a time
# Safetensors' names of what transformers stores.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: its bytes in its file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class Shards:
    """The tensors of a checkpoint folder, read one at a time.

    Attributes:
        files: in the order of their names.
        tensors: where each lies, in the order of the files.

    Raises:
        PrunerError: there are none, one is missing, truncated or no safetensors, the index names another file than one
            in the folder, or index and files disagree.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self.files, index = shard_files(self.folder)
        self.tensors: dict[str, Stored] = {}
        for file in self.files:
            for name, stored in _header(file).items():
                if name in self.tensors:
                    raise PrunerError(f"the tensor {name} is in {self.tensors[name].file.name} and in {file.name}")
                self.tensors[name] = stored
        for name, file_name in index.items():
            found = self.tensors.get(name)
            if found is None or found.file.name != file_name:
                where = "no file" if found is None else found.file.name
                raise PrunerError(f"{self.folder / INDEX} looks for {name} in {file_name}; it is in {where}")

    def of(self, file: Path) -> dict[str, Stored]:
        return {name: stored for name, stored in self.tensors.items() if stored.file == file}

    def read(self, name: str, again: bool = False) -> torch.Tensor:
        """A tensor in memory of its own, which is free again with it: nothing stays mapped.

        Args:
            again: in memory that the next such tensor overwrites, which saves making pages for each.
        """
        stored = self.tensors[name]
        size = stored.end - stored.start
        if again:
            self._buffer = self._buffer if len(self._buffer) >= size else torch.empty(size, dtype=torch.uint8)
            out = self._buffer[:size]
        else:
            out = torch.empty(size, dtype=torch.uint8)
        with stored.file.open("rb") as file:
            file.seek(stored.start)
            if file.readinto(cast(Any, out.numpy())) != size:
                raise PrunerError(f"{stored.file} ends within the tensor {name}")
        return (out.view(stored.dtype) if size else out.to(stored.dtype)).view(stored.shape)


def shard_files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The files of a checkpoint, and in which of them its index looks for each tensor."""
    index = folder / INDEX
    if not index.is_file():
        if not (folder / SINGLE).is_file():
            raise PrunerError(f"{folder} holds neither {SINGLE} nor {INDEX}; pickles are never read")
        return [folder / SINGLE], {}
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted({str(name) for name in weight_map.values()})
        weight_map = {str(tensor): str(name) for tensor, name in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PrunerError(f"{index} is damaged: {type(error).__name__} {error}") from error
    for name in names:
        if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise PrunerError(f"{index} names {name!r}, which is no safetensors file of the folder")
        if not (folder / name).is_file():
            raise PrunerError(f"{folder} lacks the shard {name} that its index names: the checkpoint is incomplete")
    if not names:
        raise PrunerError(f"{index} names no tensors")
    return [folder / name for name in names], weight_map


def _header(file: Path) -> dict[str, Stored]:
    try:
        with safe_open(str(file), "pt"):  # checks that the header is sound and the tensors fill the file
            pass
        with file.open("rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
            header = json.loads(raw.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise PrunerError(f"{file} is damaged or no safetensors file: {error}") from error
    header.pop("__metadata__", None)
    out = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["dtype"] not in DTYPES:
            raise PrunerError(f"{name} in {file} has the type {entry['dtype']}, which cannot be sliced")
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        out[name] = Stored(file, DTYPES[entry["dtype"]], tuple(entry["shape"]), start, end)
    return out


def write_shard(
    file: Path, shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], tensor: Callable[[str], torch.Tensor]
) -> str:
    """Write a safetensors file one tensor after the other; returns its SHA-256.

    Args:
        shapes: type and shape of every tensor, in the order in which they are to lie.
        tensor: gives a tensor when its turn comes.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in shapes.items():
        size = prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    digest = hashlib.sha256()
    # What is ready is hashed and written while the next one is read and cut.
    with file.open("wb") as out, ThreadPoolExecutor(1) as writer:

        def write(data: Any) -> None:
            digest.update(data)
            out.write(data)

        write(len(head).to_bytes(8, "little"))
        write(head)
        pending = None
        for name, (dtype, shape) in shapes.items():
            value = tensor(name)
            if (value.dtype, tuple(value.shape)) != (dtype, shape):
                raise AssertionError(f"{name} is {value.dtype} {list(value.shape)}, announced as {dtype} {shape}")
            if pending is not None:
                pending.result()
            pending = writer.submit(
                write, cast(Any, value.contiguous().view(-1).view(torch.uint8).numpy()) if value.numel() else b""
            )
        if pending is not None:
            pending.result()
        out.flush()
        os.fsync(out.fileno())
    return digest.hexdigest()


def write_index(folder: Path, contents: Mapping[str, Iterable[str]], total: int) -> None:
    """The index of a checkpoint of several files: which tensors each holds, and bytes in all."""
    weight_map = {tensor: file for file, tensors in contents.items() for tensor in tensors}
    document = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(file)


def _sha256(file: Path) -> str:  # Python 3.10
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while block := content.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
