"""Images and sounds to calibrate and compare models on, read by the checkpoint's own processor.

A data set is a folder of images or of 16-bit ``.wav`` files. A ``metadata.jsonl`` beside them may give texts or labels,
a line ``{"file_name": "cat.png", "text": "a cat"}`` a file, as the hub's data sets of images have it. A data set of the
hub, ``owner/name``, or a folder that holds one, has columns of images or sounds (:mod:`llm_pruner.media_rows`). The
data set ``synthetic`` is noise.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoProcessor, PreTrainedModel

from .choices import SYNTHETIC
from .corpora import NAMED, check_text
from .errors import PrunerError, in_one_line
from .graph.units import CouplingGraph, trace
from .media_rows import HELD_OUT, Medium, holds_rows, is_on_hub, read_media_rows
from .models.image_inputs import image_token
from .models.inputs import (
    ModelInputs,
    example_inputs,
    inputs_with_image,
    needed_inputs,
    reads_text_only,
    token_count,
)
from .models.running import model_inputs
from .models.tasks import predicts_tokens
from .models.towers import tower_paths
from .optional import require

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
SOUNDS = (".wav",)
CAPTION = "Describe the image."
SYNTHETIC_PIXELS = 224
TOKENS_AROUND = 16  # an image that is guessed from a config
WRITTEN_TOKENS = 16  # that a model of speech writes itself where no text is given


class NoProcessor(PrunerError):
    """A checkpoint without the files of a processor."""


def is_media(name: str) -> bool:
    """Return True if a name of a data set means images or sounds, not a text."""
    return name == SYNTHETIC or is_stored(name)


def is_stored(name: str) -> bool:
    """Return True if images or sounds by a name lie in a folder or on the hub, and are not made."""
    return name not in NAMED and (Path(name).expanduser().is_dir() or is_on_hub(name))


def check_media(name: str) -> None:
    """Refuse a folder without images and sounds.

    Raises:
        PrunerError: as :func:`read_media`; or images cannot be read, since Pillow is not installed.
    """
    if name != SYNTHETIC and not all(medium.is_sound for medium in read_media(name, "train", 1)):
        require("PIL", "report", "images need")


def check_dataset(name: str, split: str = "train") -> None:
    """Refuse a text, or a folder of images or sounds, that cannot be read or is empty.

    Raises:
        PrunerError: as :func:`check_media` and :func:`~llm_pruner.data.check_text`.
    """
    check_media(name) if is_media(name) else check_text(name, split)


def read_media(name: str, split: str | None, most: int | None = None) -> list[Medium]:
    """List the files of a folder, or the rows of a data set; every fifth is held out, of two or more one at least.

    Args:
        split: ``train`` (for calibration), ``test`` (held out), or None for all.

    Raises:
        PrunerError: the folder holds no image and no sound, its ``metadata.jsonl`` cannot be read, or the data set
            cannot be fetched or has no column of images or sounds.
    """
    folder = Path(name).expanduser()
    if is_on_hub(name) or holds_rows(folder):
        whole, media = read_media_rows(name, split, most)
        if whole:
            return media[:most]
    else:
        files = sorted(file for file in folder.iterdir() if _is_medium(file))
        if not files:
            raise PrunerError(f"{name} holds no images ({', '.join(IMAGES)}) and no sounds ({', '.join(SOUNDS)})")
        rows = dict(_metadata(folder / "metadata.jsonl"))
        media = [Medium(file=file, is_sound=file.suffix.lower() in SOUNDS, **rows.get(file.name, {})) for file in files]
    every = min(HELD_OUT, len(media))
    held_out = split == "test"
    chosen = [one for i, one in enumerate(media) if len(media) == 1 or (i % every == every - 1) == held_out]
    return (media if split is None else chosen)[:most]


def _is_medium(file: Path) -> bool:
    return file.suffix.lower() in (*IMAGES, *SOUNDS) and not file.name.startswith(".") and file.is_file()


def _metadata(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if not file.is_file():
        return
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PrunerError(f"cannot read {file}: {error}") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
                if not isinstance(row.get("text", ""), str) or not isinstance(row.get("label", ""), (str, int, list)):
                    raise TypeError
                yield row["file_name"], {name: row[name] for name in ("text", "label") if name in row}
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise PrunerError(f'{file}, line {number}: give {{"file_name": "cat.png", "text": "a cat"}}') from error


def media_inputs(
    model: PreTrainedModel, name: str, split: str | None = "train", samples: int = 16, *, seed: int = 0
) -> ModelInputs:
    """Return the inputs that the processor of a checkpoint makes of images or sounds.

    A model that writes text about images is given each in a turn of a chat. A model of speech without texts is given
    the tokens that it writes itself.

    Args:
        name: a folder, or ``synthetic`` for random images, spectrograms or waveforms, which need no processor if the
            config tells what the model reads.
        samples: largest number of samples.

    Raises:
        PrunerError: a file cannot be read, or the checkpoint has no processor.
    """
    seed = seed if split == "train" else ~seed & 0xFFFF
    if name == SYNTHETIC:
        return _noise(model, samples, seed)
    processor = load_processor(model)
    return _stacked([process(model, processor, medium) for medium in read_media(name, split, samples)])


def _noise(model: PreTrainedModel, samples: int, seed: int) -> ModelInputs:
    """Return noise; images in a text come from the checkpoint's processor, which knows the text around them."""
    in_text = reads_text_only(model) or tower_paths(model)
    try:
        processor = load_processor(model) if in_text else None
    except NoProcessor:
        if guessed := inputs_with_image(model, samples, TOKENS_AROUND, torch.Generator().manual_seed(seed)):
            return guessed
        if reads_text_only(model):
            raise
        processor = None
    if processor is None:
        drawn = example_inputs(model, rows=samples, seed=seed)
        assert isinstance(drawn, ModelInputs)
        return drawn
    noise = np.random.default_rng(seed).integers(0, 256, (samples, SYNTHETIC_PIXELS, SYNTHETIC_PIXELS, 3), np.uint8)
    with _named_refusals("a random image"):
        return _stacked([_process_image(model, processor, picture, CAPTION) for picture in noise])


def check_can_be_shown(model: PreTrainedModel) -> None:
    """Refuse a model that reads media beside text, if nothing can be shown to it.

    Raises:
        PrunerError: its checkpoint has no processor, and its config does not name the token of an image.
    """
    try:
        load_processor(model)
    except NoProcessor:
        if image_token(model, token_count(model)) is None:
            raise


def trace_media(model: PreTrainedModel, inputs: ModelInputs | None = None) -> CouplingGraph:
    """Trace a model that reads images or sounds beside text on both, so that all of its towers have units.

    Args:
        inputs: as :func:`media_inputs` returns them (default: noise).

    Raises:
        PrunerError: the checkpoint has no processor and no image can be guessed from its config, or the model cannot
            be traced.
    """
    inputs = media_inputs(model, SYNTHETIC, samples=1) if inputs is None else inputs
    return trace(model, inputs[:1].tensors())


def load_processor(model: PreTrainedModel) -> Any:
    """Load the processor of the checkpoint that a model was loaded from.

    Raises:
        NoProcessor: there is none.
        PrunerError: it needs a package that is not installed.
    """
    reads_text = predicts_tokens(model) or "input_ids" in needed_inputs(model)
    name, cause = model.name_or_path or type(model).__name__, None
    for auto_class in (AutoProcessor, AutoImageProcessor, AutoFeatureExtractor):
        try:
            processor: Any = auto_class.from_pretrained(model.name_or_path, trust_remote_code=False)
        except Exception as error:  # transformers raises whatever its loaders raise
            cause = cause or error
            continue
        if not reads_text or hasattr(processor, "tokenizer"):
            return processor
    if isinstance(cause, ImportError):
        raise PrunerError(f"the processor of {name} cannot be loaded: {in_one_line(cause)}") from cause
    raise NoProcessor(
        f"{name} has no processor to read images or sounds with: put the original's preprocessor_config.json there"
    )


def process(model: PreTrainedModel, processor: Any, medium: Medium) -> dict[str, torch.Tensor]:
    """Return one sample by the names of the model's arguments.

    Raises:
        PrunerError: the file cannot be read, or is of the other sort than the model's processor reads, or the
            processor's own files are damaged.
    """
    if medium.is_sound:
        return _process_sound(model, processor, medium)
    if hasattr(processor, "sampling_rate") or not _reads_images(processor):
        raise PrunerError(f"{type(model).__name__} reads sounds, and {medium.file} is an image")
    with _named_refusals(str(medium.file)):
        return _process_image(model, processor, medium.image(), medium.text or CAPTION)


@contextmanager
def _named_refusals(sample: str) -> Iterator[None]:
    """Name the sample that a processor refuses: its settings and its chat template come from the checkpoint."""
    try:
        yield
    except (PrunerError, MemoryError):
        raise
    except Exception as error:  # processors raise anything
        raise PrunerError(
            f"the model's processor refuses {sample}, or its own files are damaged: {in_one_line(error)}"
        ) from error


def _reads_images(processor: Any) -> bool:
    return hasattr(processor, "image_processor") or hasattr(processor, "preprocess")


def _process_image(model: PreTrainedModel, processor: Any, image: Any, text: str) -> dict[str, torch.Tensor]:
    if predicts_tokens(model):
        inputs = _process_chat(processor, image, text)
    elif "input_ids" in needed_inputs(model):
        inputs = processor(images=image, text=[text], padding="max_length", truncation=True, return_tensors="pt")
    else:
        inputs = processor(images=image, return_tensors="pt")
    return {name: value for name, value in inputs.items() if torch.is_tensor(value)}


def _process_chat(processor: Any, image: Any, text: str) -> Any:
    if getattr(processor, "chat_template", None):
        content = [{"type": "image", "image": image}, {"type": "text", "text": text}]
        return processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
        )
    marker = getattr(processor, "image_token", "<image>")
    try:  # some put the image's tokens in front of the text themselves
        inputs = processor(images=image, text=text, return_tensors="pt")
        if (inputs["input_ids"] == processor.tokenizer.convert_tokens_to_ids(str(marker))).any():
            return inputs
    except Exception:  # others refuse an image without its mark, by whatever they raise
        pass
    return processor(images=image, text=f"{marker}\n{text}", return_tensors="pt")


def process_sound(processor: Any, medium: Medium) -> dict[str, torch.Tensor]:
    """Return a sound as the inputs of a model of speech, by the names of its arguments."""
    extractor = getattr(processor, "feature_extractor", processor)
    rate = getattr(extractor, "sampling_rate", None)
    if rate is None:
        raise PrunerError(f"the model reads images, and {medium.file} is a sound")
    with _named_refusals(str(medium.file)):
        inputs = extractor(medium.sound(rate), sampling_rate=rate, return_tensors="pt")
    return {name: value for name, value in inputs.items() if torch.is_tensor(value)}


def _process_sound(model: PreTrainedModel, processor: Any, medium: Medium) -> dict[str, torch.Tensor]:
    inputs = process_sound(processor, medium)
    if "decoder_input_ids" not in needed_inputs(model):
        return inputs
    tokenizer = getattr(processor, "tokenizer", None)
    if medium.text and tokenizer is not None:
        return inputs | {"decoder_input_ids": tokenizer(medium.text, return_tensors="pt")["input_ids"]}
    heard = model_inputs(model, ModelInputs(inputs).to(model.device))
    written = model.generate(**heard, max_new_tokens=WRITTEN_TOKENS)  # type: ignore[operator]
    return inputs | {"decoder_input_ids": written.cpu()}


def _stacked(parts: list[dict[str, torch.Tensor]]) -> ModelInputs:
    """Return samples of one shape as the rows of one mapping, others as mappings of their own."""
    shapes = {tuple((name, tuple(value.shape)) for name, value in sorted(part.items())) for part in parts}
    if len(shapes) == 1 and all(len(value) == 1 for value in parts[0].values()):
        return ModelInputs({name: torch.cat([part[name] for part in parts]) for name in parts[0]})
    return ModelInputs(*parts)


def describe(name: str) -> str:
    """Return the name of a data set of images or sounds for messages."""
    if name == SYNTHETIC:
        return "noise (give a folder of images or .wav files for better ones)"
    return name
