"""Measure models on labelled examples: accuracy, rank correlation, word error rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..corpora import read_rows
from ..errors import PrunerError
from ..media import check_media, is_stored, load_processor, process, process_sound, read_media
from ..media_rows import Medium
from ..models.blockwise import computing
from ..models.inputs import Inputs, ModelInputs, reads_text_only
from ..models.running import evaluating, forward, main_output, model_inputs
from ..models.tasks import CTC, FEATURES, SPEECH, task_name
from ..progress import track
from .similarity import gives_several_classes, text_inputs

CLASSIFIERS = ("text-classification", "image-classification", "audio-classification", "video-classification")
# Names of the columns of two texts, as data sets have them; the second of a classifier may be missing.
PAIRS = (
    ("text", "other"),
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("query", "passage"),
)
FORMS = {
    "classes": '{"text": "…", "label": "…"}, with a second text under "other", or a folder with {"file_name": "…", '
    '"label": "…"} in metadata.jsonl',
    "scores": '{"text": "…", "score": 0.5}, with a second text under "other"',
    "pairs": '{"text": "…", "other": "…", "score": 0.5}',
    "speech": 'a folder of .wav files with {"file_name": "…", "text": "…"} in metadata.jsonl',
}


def form_of(model: PreTrainedModel) -> str:
    """Return the key of :data:`FORMS` for the labelled examples of a model.

    Raises:
        PrunerError: the outputs of such a model cannot be compared with labels.
    """
    task = task_name(model)
    if task in (SPEECH, CTC):
        return "speech"
    if task in CLASSIFIERS:
        return "scores" if model.config.num_labels == 1 else "classes"
    if task == FEATURES and reads_text_only(model):
        return "pairs"
    raise PrunerError(
        f"--labelled needs a classifier, a model of text embeddings or one of speech, not a {type(model).__name__}"
    )


def check_labelled(name: str) -> None:
    """Refuse a labelled file or folder that cannot be read or is empty.

    Raises:
        PrunerError: the file or folder cannot be read, or holds no rows.
    """
    path = Path(name).expanduser()
    if is_stored(name):
        check_media(name)
    elif path.suffix not in (".json", ".jsonl") or not path.is_file() or next(read_rows(path), None) is None:
        raise PrunerError(f"give a .json or .jsonl file with rows such as {FORMS['classes']}")


@torch.no_grad()
def measure_labelled(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, name: str, most: int | None = None
) -> dict[str, float]:
    """Measure a model on labelled examples.

    Args:
        name: a ``.json`` or ``.jsonl`` file of rows, or a folder of images or sounds; see :data:`FORMS`.
        most: use only the first examples.

    Returns:
        ``acc`` and its standard error ``acc_stderr`` of a classifier, of one that gives several classes the share of
        examples with all of them right; ``spearman``, the rank correlation between the
        scores of the rows and the model's scores, or the cosines of its mean hidden states, of a reward or embedding
        model; ``wer``, word errors over words, of a model of speech.

    Raises:
        PrunerError: the file has other rows than the model needs, or a label that the model does not know.
    """
    form = form_of(model)
    with evaluating(model), computing(model) as used:
        run = _Runner(model, tokenizer, used.device)
        if form == "speech":
            return _word_errors(run, _media(name, "text", form, most))
        if form == "classes":
            return _accuracy(run, name, most)
        rows = _text_rows(name, "score", form, most)
        if form == "scores":
            found = [run.output(row.texts).item() for row in track(rows, f"scores on {name}")]
        else:
            found = [
                torch.cosine_similarity(run.embedding(row.texts[0]), run.embedding(row.texts[1]), dim=0).item()
                for row in track(rows, f"pairs of {name}")
            ]
    ranks = torch.stack([_ranks(found), _ranks([float(row.value) for row in rows])])
    if (ranks == ranks[:, :1]).all(1).any():
        raise PrunerError(f"--labelled {name}: all scores are equal, so there is no order to compare")
    return {"spearman": ranks.corrcoef()[0, 1].item()}


def _ranks(scores: list[float]) -> torch.Tensor:
    """Return the ranks of scores from 1 up, float64; equal ones share the mean of theirs."""
    _, at, counts = torch.tensor(scores, dtype=torch.float64).unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2).double()[at]


class _Runner:
    """A model with the tokenizer or processor that reads its inputs."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, device: torch.device):
        self.model, self.tokenizer, self.device = model, tokenizer, device
        self.processor = None if reads_text_only(model) else load_processor(model)

    def output(self, example: Sequence[str] | Medium) -> torch.Tensor:
        """Return the main output for one example, one or two texts or a medium, without the dim of rows."""
        inputs: Inputs
        if isinstance(example, Medium):
            inputs = ModelInputs(process(self.model, self.processor, example))
        elif self.tokenizer is None or not reads_text_only(self.model):
            raise PrunerError(f"--labelled: {type(self.model).__name__} reads no text: give a folder of its inputs")
        else:
            inputs = text_inputs(self.model, self.tokenizer, *example)
        output = main_output(forward(self.model, inputs.to(self.device)))[0].float().cpu()
        if not bool(output.isfinite().all()):  # an order of NaN would look like a result
            name = self.model.name_or_path or type(self.model).__name__
            raise PrunerError(
                f"--labelled: the outputs of {name} are not finite: check its weights, or load it in float32"
            )
        return output

    def classes(self, example: Sequence[str] | Medium) -> set[int]:
        """Return the indices of the classes that the model gives to an example."""
        output = self.output(example)
        several = gives_several_classes(self.model)
        return set(output.gt(0).nonzero().flatten().tolist()) if several else {int(output.argmax())}

    def embedding(self, text: str) -> torch.Tensor:
        """Return the mean of the last hidden states of a text, ``[hidden]``."""
        return self.output((text,)).mean(dim=0)

    def transcript(self, medium: Medium) -> str:
        """Return the words that a model of speech recognises in a sound."""
        inputs = model_inputs(self.model, ModelInputs(process_sound(self.processor, medium)).to(self.device))
        if task_name(self.model) == SPEECH:
            ids = self.model.generate(**inputs)  # type: ignore[operator]
        else:
            ids = main_output(self.model(**inputs)).argmax(dim=-1)
        return str(self.processor.batch_decode(ids, skip_special_tokens=True)[0])  # type: ignore[union-attr]


def _accuracy(run: _Runner, name: str, most: int | None) -> dict[str, float]:
    examples: list[tuple[Sequence[str] | Medium, Any]]
    if Path(name).expanduser().is_dir():
        examples = [(medium, medium.label) for medium in _media(name, "label", "classes", most)]
    else:
        examples = [(row.texts, row.value) for row in _text_rows(name, "label", "classes", most)]
    labels = [_classes_of(run.model, label, name) for _, label in examples]
    right = [
        run.classes(example) == label
        for (example, _), label in track(list(zip(examples, labels, strict=True)), f"classes of {name}")
    ]
    share = sum(right) / len(right)
    return {"acc": share, "acc_stderr": (share * (1 - share) / max(1, len(right) - 1)) ** 0.5}


def _classes_of(model: PreTrainedModel, label: Any, name: str) -> set[int]:
    """Return the indices of the classes that a row names: one, or the list of a classifier that may give several."""
    several = gives_several_classes(model)
    if several != isinstance(label, list):
        form = 'several classes to an input: give lists, as in "label": ["…", "…"]' if several else "one class each"
        raise PrunerError(f"{name}: label {label!r}: {type(model).__name__} gives {form}")
    return {_class_of(model, one, name) for one in (label if several else [label])}


def _class_of(model: PreTrainedModel, label: Any, name: str) -> int:
    """Return the index of a class by its name or number."""
    indices: dict[str, Any] = model.config.label2id or {}
    if isinstance(label, str) and label in indices:
        return int(indices[label])
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(indices):
        return label
    raise PrunerError(f"{name}: the model has no class {label!r}; it has {', '.join(list(indices)[:8])}")


def _word_errors(run: _Runner, media: list[Medium]) -> dict[str, float]:
    errors = words = 0
    for medium in track(media, "transcripts"):
        reference = str(medium.text).lower().split()
        errors += edit_distance(reference, run.transcript(medium).lower().split())
        words += len(reference)
    return {"wer": errors / max(1, words)}


def edit_distance(one: Sequence[str], other: Sequence[str]) -> int:
    """Return the fewest insertions, deletions and replacements between two sequences.

    >>> edit_distance("the cat sat".split(), "the sat down".split())
    2
    """
    before = list(range(len(other) + 1))
    for i, item in enumerate(one, 1):
        row = [i]
        for j, compared in enumerate(other, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (item != compared)))
        before = row
    return before[-1]


@dataclass(frozen=True, kw_only=True)
class LabelledText:
    """A row of a labelled file: one text or two, and its label or score."""

    texts: tuple[str, ...]
    value: Any


def _text_rows(name: str, field: str, form: str, most: int | None) -> list[LabelledText]:
    """Read the rows of a file; those of one file have the same columns of texts.

    Args:
        field: ``label`` or ``score``.
    """
    path = Path(name).expanduser()
    rows = list(read_rows(path))[:most] if path.is_file() else []
    if not rows:
        raise PrunerError(f"--labelled {name} must be a file of rows such as {FORMS[form]}")
    columns = _text_columns(rows[0], form)
    examples = []
    for number, row in enumerate(rows, 1):
        values = row if isinstance(row, dict) else {}
        texts: tuple[Any, ...] = tuple(values.get(column) for column in columns)
        score = values.get("score") if field == "score" else 0.0
        whole = all(isinstance(text, str) and text.strip() for text in texts) and type(score) in (int, float)
        if not whole or _text_columns(row, form) != columns:
            raise PrunerError(f"--labelled {name}, row {number}: rows must be such as {FORMS[form]}")
        if field == "label" and ("label" not in row or row.keys() - {*columns, "label", "id", "idx"}):
            raise PrunerError(f"--labelled {name}, row {number} has {', '.join(row)}: give {FORMS[form]}")
        examples.append(LabelledText(texts=texts, value=row[field]))
    return examples


def _text_columns(row: Any, form: str) -> tuple[str, ...]:
    """Return the columns of the texts, by the first row: two where it has two that belong together."""
    pair = next((pair for pair in PAIRS if isinstance(row, dict) and row.keys() >= {*pair}), None)
    return ("text", "other") if form == "pairs" else pair or ("text",)


def _media(name: str, field: str, form: str, most: int | None) -> list[Medium]:
    if not is_stored(name):
        raise PrunerError(f"--labelled {name} must be {FORMS[form]}")
    media = read_media(name, None, most)
    without = next((medium.file for medium in media if getattr(medium, field) in (None, "")), None)
    if without is not None:
        raise PrunerError(f"--labelled {name}: metadata.jsonl has no {field} of {without.name}; give {FORMS[form]}")
    return media
