"""Data sets of a recovery run: training and validation examples, validation texts, and the collator."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, cast

import torch
from transformers import DataCollatorForSeq2Seq, PreTrainedModel, PreTrainedTokenizerBase

from ..choices import EMBEDDED_TEXTS
from ..corpora import text
from ..errors import PrunerError
from ..evaluation.perplexity import check_length, windows
from ..files import complete_folder, folder_lock
from ..logs import log
from ..models.loss import IGNORED
from ..models.running import context_length
from .arguments import DEFAULT_DATA
from .rows import read_rows
from .settings import DataSettings
from .tokenize import ExampleFormat, fingerprint, tokenize

WINDOW = 128  # tokens of a window of --extra_val_dataset, as in LLM-Pruner
CACHE = Path("datasets/cache")
SPLIT_SEED = 42  # LLM-Pruner's: the same examples are held out whatever --seed is


def training_data(data: DataSettings, tokenizer: PreTrainedTokenizerBase, form: ExampleFormat) -> tuple[Any, Any]:
    """Return training and validation examples; no validation examples (None) if their number is 0.

    Raises:
        PrunerError: a source cannot be read or has malformed rows, or validation leaves nothing to train on.
    """
    import datasets

    parts = [_tokenize_source(source, data, tokenizer, form) for source in data.sources]
    if data.streaming:
        stream = datasets.interleave_datasets(parts, stopping_strategy="all_exhausted_without_replacement")
        size = 100 if data.validation_size is None else data.validation_size
        first = list(stream.take(size + 1))
        _check_rest(size, len(first))
        held_out = datasets.Dataset.from_list(first[:size]) if size else None
        # Shuffled last: held-out examples stay out in every pass over the data.
        return stream.skip(size).shuffle(seed=data.seed, buffer_size=1000), held_out
    examples = datasets.concatenate_datasets(parts)
    in_memory = not examples.cache_files
    size = min(2000, len(examples) // 20) if data.validation_size is None else data.validation_size
    _check_rest(size, len(examples))
    if not size:
        return examples.shuffle(seed=SPLIT_SEED, keep_in_memory=in_memory), None
    split = examples.train_test_split(test_size=size, shuffle=True, seed=SPLIT_SEED, keep_in_memory=in_memory)
    log.info("%d examples to train on, %d to validate", len(split["train"]), size)
    return split["train"], split["test"]


def _check_rest(held_out: int, examples: int) -> None:
    if not examples:
        raise PrunerError("no row of the data makes an example: give other data, or another --cutoff_len")
    if held_out >= examples:
        raise PrunerError(f"--val_set_size {held_out} leaves nothing of {examples} examples to train on: give less")


def reachable_sources(data: DataSettings) -> tuple[str, ...]:
    """Return the data sets to train on: by default Alpaca, or the embedded texts where the hub cannot be reached."""
    if data.sources:
        return data.sources
    try:
        read_rows(DEFAULT_DATA, data.streaming)
    except PrunerError:
        log.info("%s cannot be reached: training on the embedded texts %s", DEFAULT_DATA, ", ".join(EMBEDDED_TEXTS))
        return EMBEDDED_TEXTS
    return (DEFAULT_DATA,)


def _tokenize_source(source: str, data: DataSettings, tokenizer: PreTrainedTokenizerBase, form: ExampleFormat) -> Any:
    import datasets

    if not data.cache or data.streaming:
        return _as_int64(tokenize(read_rows(source, data.streaming), tokenizer, form, source))
    folder = CACHE / fingerprint(source, tokenizer, form)
    with folder_lock(CACHE.parent, folder.name):  # a second process waits and reads the first one's
        if not folder.is_dir():
            with complete_folder(folder, owned_if="dataset_info.json") as temporary:
                _as_int64(tokenize(read_rows(source), tokenizer, form, source)).save_to_disk(str(temporary))
    log.info("tokenized data of %s: %s", source, folder)
    return datasets.load_from_disk(str(folder))


def _as_int64(examples: Any) -> Any:
    """Give examples of all sources the same column types, which concatenating them demands."""
    import datasets

    ids = datasets.List(datasets.Value("int64"))
    return examples.cast(datasets.Features({"input_ids": ids, "labels": ids}))


def validation_windows(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_windows: int | None = None,
    *,
    bos: bool = True,
) -> Any:
    """Return windows of a held-out text as a data set; an encoder-decoder reads one half and writes the other.

    Raises:
        PrunerError: the text cannot be read or is too short, or the model reads fewer tokens at once.
    """
    import datasets

    check_length(model, WINDOW)
    ids = windows(tokenizer, text(name, "test"), WINDOW, max_windows, bos=bos)
    inputs, labels = (ids[:, : WINDOW // 2], ids[:, WINDOW // 2 :]) if model.config.is_encoder_decoder else (ids, ids)
    return datasets.Dataset.from_dict({"input_ids": inputs.tolist(), "labels": labels.tolist()})


def predicted_tokens(examples: Any) -> int:
    """Count the tokens of validation windows that have a loss: of a decoder's window all but the first."""
    return sum(len(row) - (len(row) == WINDOW) for row in examples["labels"])


def padding_collator(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> DataCollatorForSeq2Seq:
    """Return a collator that pads on the right, with a padding token even if the tokenizer has none."""
    padding = copy.deepcopy(tokenizer)  # the tokenizer is saved unchanged
    if padding.pad_token_id is None:
        padding.pad_token = padding.eos_token or padding.convert_ids_to_tokens(0)
    padding.padding_side = "right"
    decoder = _RightShift(model) if model.config.is_encoder_decoder else None
    # Padding beyond the context would need positions that the model does not have.
    multiple = 8 if (context_length(model) or 8) % 8 == 0 else None
    return DataCollatorForSeq2Seq(padding, model=decoder, pad_to_multiple_of=multiple, return_tensors="pt")


class _RightShift:
    """Decoder inputs from labels, also for the classes that make them only in their own forward pass."""

    def __init__(self, model: PreTrainedModel):
        self._own, self._config = getattr(model, "prepare_decoder_input_ids_from_labels", None), model.config

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """Return labels ``[rows, tokens]`` moved right by one, behind the token that a decoder begins with."""
        if self._own is not None:
            return cast(torch.Tensor, self._own(labels=labels))
        start = labels.new_full((len(labels), 1), self._config.decoder_start_token_id)
        shifted = torch.cat([start, labels[:, :-1]], dim=1)
        return shifted.masked_fill(shifted == IGNORED, self._config.pad_token_id)
