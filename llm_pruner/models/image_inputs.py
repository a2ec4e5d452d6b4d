"""Draw an image and the text around it for a language model that reads images, by its signature and its config.

Models mark the places of an image in their text by a token that the config names, one for each feature that
``get_image_features`` returns. How they take the pixels is told by the names of its arguments: whole images, a list of
images a sample, or the patches of an image in a row, with a tensor that says how these lie in it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .input_sizes import Fields, image_shape

PATCHES_A_SIDE = 2  # of what the model merges
TILES = 3  # of an image beside which the model reads its two halves
IMAGE_AT = 4  # of the first of the image's tokens


def image_token(model: nn.Module, vocabulary: int) -> int | None:
    """Return the token in whose places a model reads an image; None if its config names none of ``vocabulary``."""
    token = Fields(model.config).get("image_token_id", "image_token_index")
    return token if hasattr(model, "get_image_features") and isinstance(token, int) and token < vocabulary else None


def draw_image_in_text(
    model: nn.Module, vocabulary: int, tokens: int, generator: torch.Generator
) -> dict[str, torch.Tensor] | None:
    """Draw a text of so many random tokens with a random image in it.

    Returns:
        One sample by the names of the arguments of the model's ``forward``; None if its class takes images in no way
        that is known, or its config does not name the token in whose places they are read.
    """
    mark = image_token(model, vocabulary)
    if not mark:
        return None
    words = torch.randint(0, mark, (1, tokens), generator=generator)
    for pixels in _ways_to_take_an_image(model, generator):
        if count := _count_features(model, pixels):
            ids = torch.cat([words[:, :IMAGE_AT], torch.full((1, count), mark), words[:, IMAGE_AT:]], 1)
            kinds = {"mm_token_type_ids", "token_type_ids"} & inspect.signature(model.forward).parameters.keys()
            return {"input_ids": ids, **pixels, **dict.fromkeys(kinds, (ids == mark).long())}
    return None


def _ways_to_take_an_image(model: Any, generator: torch.Generator) -> Iterator[dict[str, torch.Tensor]]:
    """Yield an image by the arguments of ``get_image_features``, in every way that these can be meant."""
    fields, names = Fields(model.config), inspect.signature(model.get_image_features).parameters
    channels, height, width = image_shape(fields)
    image = torch.rand((1, channels, height, width), generator=generator) * 2 - 1
    size = {"image_sizes": torch.tensor([[height, width]])} if "image_sizes" in names else {}
    yield {"pixel_values": image, **size}
    yield {"pixel_values": image[:, None], **size}
    yield {"pixel_values": image[:, None].expand(1, TILES, -1, -1, -1), **size}
    patch, merged = fields.get("patch_size"), fields.get("spatial_merge_size", default=1)
    if not isinstance(patch, int):
        return
    side = PATCHES_A_SIDE * merged
    whole = {
        "spatial_shapes": torch.tensor([[side, side]]),
        "pixel_attention_mask": torch.ones(1, side * side, dtype=torch.long),
    }
    grid = {"image_grid_thw": torch.tensor([[1, side, side]])}
    if "image_merge_sizes" in inspect.signature(model.forward).parameters:
        grid["image_merge_sizes"] = torch.tensor([merged])
    for frames in dict.fromkeys((fields.get("temporal_patch_size", default=1), 1)):
        patches = torch.rand((side * side, frames * channels, patch, patch), generator=generator) * 2 - 1
        yield {"pixel_values": patches.flatten(1), **grid}
        yield {"pixel_values": patches, **grid}
        yield {"pixel_values": patches.flatten(1)[None], **whole}


@torch.no_grad()
def _count_features(model: Any, pixels: dict[str, torch.Tensor]) -> int:
    """Return the number of tokens that an image takes, 0 if the model does not take it so."""
    device = next(iter(model.parameters())).device
    try:
        output = model.get_image_features(**{name: value.to(device) for name, value in pixels.items()})
    except Exception:  # whatever the class raises for an image of another shape
        return 0
    features = getattr(output, "pooler_output", output)
    if features is None:  # a projector follows (Llama 4)
        features = output.last_hidden_state
    parts = [features] if isinstance(features, torch.Tensor) else list(features)
    return sum(part.numel() // part.shape[-1] for part in parts)
