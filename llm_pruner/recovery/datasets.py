"""The data of a recovery run: what it trains on, what it is validated on, and how examples become batches."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from transformers import DataCollatorForSeq2Seq, PreTrainedModel, PreTrainedTokenizerBase

from ..data import EMBEDDED_TEXT, text
from ..errors import PrunerError
from ..evaluation.perplexity import check_length, windows
from ..files import complete_folder, folder_lock
from ..logs import log
from .arguments import DEFAULT_DATA, RecoverArguments
from .tokenize import Format, fingerprint, rows, tokenized

WINDOW = 128  # tokens of a window of --extra_val_dataset, as LLM-Pruner has it
CACHE = Path("datasets/cache")


def training_data(args: RecoverArguments, tokenizer: PreTrainedTokenizerBase, form: Format) -> tuple[Any, Any]:
    """Training and validation examples; these None where there are to be none."""
    import datasets

    sources = args.data_path or [DEFAULT_DATA]
    if not args.data_path:
        try:
            rows(DEFAULT_DATA, args.streaming)
        except PrunerError:
            log.info("%s is out of reach: training on %s", DEFAULT_DATA, EMBEDDED_TEXT)
            sources = [EMBEDDED_TEXT]
    parts = [_part(source, args, tokenizer, form) for source in sources]
    if args.streaming:
        found = datasets.interleave_datasets(parts, stopping_strategy="all_exhausted_without_replacement")
        held_out = 100 if args.val_set_size is None else args.val_set_size
        validation = datasets.Dataset.from_list(list(found.take(held_out))) if held_out else None
        # Shuffled last: what is held out stays out, however often the data is gone through.
        return found.skip(held_out).shuffle(seed=args.seed, buffer_size=1000), validation
    found = datasets.concatenate_datasets(parts)
    in_memory = not found.cache_files
    held_out = min(2000, len(found) // 20) if args.val_set_size is None else args.val_set_size
    if held_out >= len(found):
        raise PrunerError(f"--val_set_size {held_out} leaves nothing of {len(found)} examples to train on")
    if not held_out:
        return found.shuffle(seed=42, keep_in_memory=in_memory), None
    split = found.train_test_split(test_size=held_out, shuffle=True, seed=42, keep_in_memory=in_memory)
    log.info("%d examples to train on, %d to validate", len(split["train"]), held_out)
    return split["train"], split["test"]


def _part(source: str, args: RecoverArguments, tokenizer: PreTrainedTokenizerBase, form: Format) -> Any:
    import datasets

    if not args.cache_dataset or args.streaming:
        return _typed(tokenized(rows(source, args.streaming), tokenizer, form, source))
    folder = CACHE / fingerprint(source, tokenizer, form)
    with folder_lock(CACHE.parent, folder.name):  # others that want the same wait for it
        if not folder.is_dir():
            with complete_folder(folder, owned_if="dataset_info.json") as temporary:
                _typed(tokenized(rows(source), tokenizer, form, source)).save_to_disk(str(temporary))
    log.info("tokenized data of %s: %s", source, folder)
    return datasets.load_from_disk(str(folder))


def _typed(data: Any) -> Any:
    import datasets

    ids = datasets.List(datasets.Value("int64"))
    return data.cast(datasets.Features({"input_ids": ids, "labels": ids}))


def text_set(name: str, args: RecoverArguments, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Any:
    import datasets

    check_length(model, WINDOW)
    ids = windows(tokenizer, text(name, "test"), WINDOW, args.max_windows or None)
    inputs, labels = (ids[:, : WINDOW // 2], ids[:, WINDOW // 2 :]) if model.config.is_encoder_decoder else (ids, ids)
    return datasets.Dataset.from_dict({"input_ids": inputs.tolist(), "labels": labels.tolist()})


def collator(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> DataCollatorForSeq2Seq:
    padding = copy.deepcopy(tokenizer)  # the tokenizer is saved as it came
    if padding.pad_token_id is None:
        padding.pad_token = padding.eos_token or padding.convert_ids_to_tokens(0)
    padding.padding_side = "right"
    of = model if model.config.is_encoder_decoder else None
    return DataCollatorForSeq2Seq(padding, model=of, pad_to_multiple_of=8, return_tensors="pt", padding=True)
