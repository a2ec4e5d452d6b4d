"""Sizes of the images and sounds that a model reads, by conventional fields of its config."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import PrunerError

IMAGE_SIZE, CHANNELS, SAMPLES_OF_SOUND, MEL_FRAMES = 224, 3, 16_000, 64  # where a config states none
# Where the config of a model that reads images or audio may be.
INNER_CONFIGS = ("vision_config", "audio_config", "encoder_config", "backbone_config", "encoder")


class Fields:
    """Fields of a config or, where it has no such field, of the configs inside it that are of images or audio."""

    def __init__(self, config: Any):
        inner = (getattr(config, name, None) for name in INNER_CONFIGS)
        self.configs = [config, *(one for one in inner if one is not None)]

    def __contains__(self, name: str) -> bool:
        return self.get(name) is not None

    def get(self, *names: str, default: Any = None) -> Any:
        """Return the first of the named fields that a config states."""
        values = (getattr(config, name, None) for name in names for config in self.configs)
        return next((value for value in values if value is not None), default)


def image_shape(fields: Fields) -> tuple[int, int, int]:
    """Return the channels, the height and the width of an image."""
    size = fields.get("image_size", "input_size", default=IMAGE_SIZE)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return fields.get("num_channels", "in_channels", "num_input_channels", default=CHANNELS), height, width


def input_shape(model: nn.Module, name: str) -> tuple[int, ...]:
    """Return the shape of one sample of an input.

    Raises:
        PrunerError: it cannot be told from the config.
    """
    fields = Fields(model.config)
    if name in ("pixel_values", "pixel_values_videos"):
        frames = fields.get("num_frames", default=16 if name == "pixel_values_videos" else None)
        channels, height, width = image_shape(fields)
        return (channels, height, width) if frames is None else (frames, channels, height, width)
    if name == "input_features":
        if (longest := fields.get("max_source_positions")) and (bins := fields.get("num_mel_bins")):
            return (bins, 2 * longest)  # a convolution of stride 2 halves it
        features = fields.get("input_feat_per_channel", "feature_projection_input_dim", "input_dim", "num_mel_bins")
        if features is not None:
            return (MEL_FRAMES, features * fields.get("input_channels", default=1))
    if name == "input_values":
        bins, longest = fields.get("num_mel_bins"), fields.get("max_length")
        return (longest, bins) if bins is not None and "frequency_stride" in fields else (SAMPLES_OF_SOUND,)
    raise PrunerError(
        f"{type(model).__name__} needs {name!r}, which cannot be guessed: give lp.trace(model, inputs=…) what "
        "its processor returns, and lp.score and lp.verify the same"
    )
