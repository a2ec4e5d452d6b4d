"""Images and sounds as rows of a data set: one of the hub, or a folder that holds one, such as its parquet files."""

from __future__ import annotations

import operator
import re
import wave
from dataclasses import dataclass, field
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from .errors import PrunerError, Unavailable, in_one_line

HELD_OUT = 5  # every fifth file or row is for measuring
ON_HUB = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
ROWS = (".parquet", ".arrow")
MEASURED = ("test", "validation")  # splits to measure on
TEXTS = ("text", "caption", "sentence", "transcription")  # columns that are preferred to others with texts


@dataclass(frozen=True, kw_only=True)
class Medium:
    """An image or a sound, and the text and label that belong to it, if any.

    Attributes:
        file: where it is, or what messages call it.
        content: bytes of the file, where they are not in one of their own.
    """

    file: Path
    is_sound: bool
    text: str | None = None
    label: str | int | list[str | int] | None = None
    content: bytes | None = field(default=None, repr=False)

    @property
    def _source(self) -> BytesIO | str:
        return str(self.file) if self.content is None else BytesIO(self.content)

    def image(self) -> Any:
        """Return the picture.

        Raises:
            PrunerError: the file cannot be read.
        """
        from PIL import Image

        try:
            return Image.open(self._source).convert("RGB")
        except (OSError, ValueError) as error:
            raise PrunerError(f"cannot read the image {self.file}: {error}") from error

    def sound(self, rate: int) -> np.ndarray:
        """Return the samples of a mono mix in [-1, 1), float32 ``[samples]``.

        Raises:
            PrunerError: the file cannot be read, or has another sampling rate.
        """
        try:
            with wave.open(self._source) as sound:
                parameters = sound.getparams()
                content = sound.readframes(parameters.nframes)
        except (OSError, EOFError, wave.Error) as error:
            raise PrunerError(f"cannot read the sound {self.file}: {error}") from error
        if parameters.sampwidth != 2 or parameters.framerate != rate:
            raise PrunerError(
                f"{self.file} has {8 * parameters.sampwidth} bits at {parameters.framerate} Hz and the model reads 16 "
                f"bits at {rate} Hz: convert it with ffmpeg -i {self.file.name} -ar {rate} -sample_fmt s16 out.wav"
            )
        whole = len(content) // (2 * parameters.nchannels) * 2 * parameters.nchannels  # of a file that was cut short
        samples = np.frombuffer(content[:whole], dtype="<i2").astype(np.float32) / 2**15
        if not len(samples):
            raise PrunerError(f"the sound {self.file} is empty")
        return samples.reshape(-1, parameters.nchannels).mean(axis=1)


def is_on_hub(name: str) -> bool:
    """Return True for ``owner/name`` that is no local path and no file of texts.

    >>> is_on_hub("hf-internal-testing/fixtures_image_utils"), is_on_hub("c4"), is_on_hub("texts/chats.jsonl")
    (True, False, False)
    """
    path = Path(name).expanduser()
    return bool(ON_HUB.fullmatch(name)) and path.suffix not in (".txt", ".json", ".jsonl") and not path.exists()


def holds_rows(folder: Path) -> bool:
    """Return True if a folder holds a data set in files of rows."""
    return any(file.suffix in ROWS for file in folder.rglob("*"))


def read_media_rows(name: str, split: str | None, most: int | None) -> tuple[bool, list[Medium]]:
    """Read the images or sounds of a data set, with its texts and labels: the first column of each sort.

    Rows without an image or a sound are left out.

    Returns:
        True and the rows of a split of the data set's own for measuring or training; or False and all rows, of which
        some are to be held out, as many as :func:`llm_pruner.media.read_media` needs for ``most``.

    Raises:
        PrunerError: the data set cannot be fetched, or has no column of images or sounds.
    """
    try:
        from datasets import load_dataset

        splits = load_dataset(str(Path(name).expanduser()) if Path(name).exists() else name, streaming=True)
        own = next((one for one in MEASURED if one in splits), None)
        part = own if own and split != "train" else next((one for one in ("train", *splits) if one in splits), own)
        data = splits[part]
        columns = _columns(data.features or {})
        if columns["medium"] is None:
            raise PrunerError(f"{name} has no column of images or sounds; it has {', '.join(data.features or ())}")
        data = data.cast_column(columns["medium"], type(data.features[columns["medium"]])(decode=False))
        rows = list(islice(data, None if most is None else most if own else max(HELD_OUT, HELD_OUT * most)))
        features = data.features
    except PrunerError:
        raise
    except Exception as error:  # the hub client raises many kinds; the user needs one line
        raise Unavailable(
            f"the data set {name} could not be fetched ({in_one_line(error, 160)}); give a local file or folder instead"
        ) from error
    value = operator.itemgetter(columns["medium"])
    filled = [(i, row) for i, row in enumerate(rows) if value(row) and (value(row)["bytes"] or value(row)["path"])]
    if not filled:
        raise PrunerError(f"{name} holds no rows with an image or a sound")
    media = [_medium(f"{name}, row {i}", row, columns, features) for i, row in filled]
    return own is not None, media


def _columns(features: Any) -> dict[str, str | None]:
    """Return the column of images or sounds, of texts and of labels, None where there is none, by the features' types.

    Of several columns with texts, one that is called as captions and transcripts are, else the first.
    """
    sorts: dict[str, list[str]] = {"medium": [], "text": [], "label": []}
    for column, feature in features.items():
        kind = type(feature).__name__
        if kind in ("Image", "Audio"):
            sorts["medium"].append(column)
        elif kind == "ClassLabel":
            sorts["label"].append(column)
        elif getattr(feature, "dtype", None) in ("string", "large_string"):
            sorts["text"].append(column)
    sorts["text"].sort(key=lambda column: column not in TEXTS)
    return {sort: found[0] if found else None for sort, found in sorts.items()}


def _medium(name: str, row: dict[str, Any], columns: dict[str, str | None], features: Any) -> Medium:
    column, text, label = str(columns["medium"]), columns["text"], columns["label"]
    value, number = row[column], row[label] if label else None
    return Medium(
        file=Path(name) if value["bytes"] else Path(value["path"]),
        is_sound=type(features[column]).__name__ == "Audio",
        content=value["bytes"],
        text=row[text] if text else None,
        label=features[label].int2str(number) if isinstance(number, int) and number >= 0 else None,
    )
