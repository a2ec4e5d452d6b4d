"""Find the positions of a model's tensors that a quantized checkpoint stores together."""

from __future__ import annotations

from pathlib import Path

from ..errors import PrunerError
from ..models.skeleton import canonical_names
from .config import load_config
from .locate import locate
from .quantized.registry import QuantizedShards, open_shards, quantization_of
from .stored import model_of, stored_boxes

# By tensor of the model and dim: spans of positions (start, stop), and how many of them share a number.
Blocks = dict[str, dict[int, set[tuple[int, int, int]]]]


def is_quantized(source: str) -> bool:
    """Return True for a folder whose config describes quantized weights.

    Raises:
        PrunerError: the model does not exist, or its config cannot be read.
    """
    path, gguf = locate(source)
    return gguf is None and quantization_of(path) is not None


def check_dequantize(source: str, dequantize: bool) -> None:
    """Refuse ``--dequantize`` for weights that are not quantized.

    Raises:
        PrunerError: as above.
    """
    if dequantize and not is_quantized(source):
        raise PrunerError(f"--dequantize has no effect on {source}, which is not quantized: leave it out")


def stored_blocks(source: str, trust_remote_code: bool = False, *, task: str | None = None) -> Blocks:
    """Return the positions that a checkpoint stores together, none for one that is not quantized.

    Raises:
        PrunerError: a file is damaged, or holds weights in a form that cannot be placed within the model's tensors.
    """
    path = Path(locate(source)[0])
    shards = open_shards(source, path) if is_quantized(source) else None
    if not isinstance(shards, QuantizedShards):
        return {}
    config = load_config(source, trust_remote_code, task=task)
    model = model_of(source, config, shards, trust_remote_code=trust_remote_code)
    canonical = canonical_names(model)
    blocks: Blocks = {}
    for name, box in stored_boxes(model, shards).items():
        for dim, place in enumerate(box.dims):
            if name not in shards.weights or isinstance(place, int):
                continue
            spans = {(place[1], place[1] + box.shape[place[0]], size) for size in shards.weights[name].blocks(place[0])}
            if spans:
                blocks.setdefault(canonical[box.parameter], {}).setdefault(dim, set()).update(spans)
    return blocks
