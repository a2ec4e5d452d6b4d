"""Refuse models, texts and files that ``llm-pruner vocab`` cannot use, before anything is loaded."""

from __future__ import annotations

from pathlib import Path

from ..checkpoint.blocks import check_dequantize
from ..checkpoint.checking import check_model
from ..checkpoint.load import load_tokenizer, no_tokenizer
from ..checkpoint.locate import locate
from ..corpora import check_text
from ..errors import PrunerError, Unavailable
from ..files import check_file, check_folder, read_json
from ..inputs import InputCheck
from .arguments import VocabArguments
from .choosing import check_scripts, token_budget
from .counting import iterate_documents
from .retention import read_list
from .run import resolve

ANY_SIZE = 2**31  # of a vocabulary


def check_vocabulary_inputs(arguments: VocabArguments, check: InputCheck) -> None:
    """Refuse what ``llm-pruner vocab`` cannot use."""
    if arguments.keep:
        token_budget(arguments.keep, ANY_SIZE)
    settings = resolve(arguments)
    check_scripts(settings.scripts)
    if not check.skips(arguments.model):
        with check.flag("model", arguments.model):
            check_model(arguments.model, arguments.trust_remote_code, tokenizer=True)
            check_dequantize(arguments.model, arguments.dequantize)
    _check_corpus(arguments.corpus, check)
    with check.flag("eval_dataset", arguments.eval_dataset):
        check_text(arguments.eval_dataset, "test")
    if settings.listed is not None:
        with check.flag("keep_tokens", settings.listed):
            read_list(settings.listed)
    if arguments.to_tokenizer and not check.skips(arguments.to_tokenizer):
        with check.flag("to_tokenizer", arguments.to_tokenizer):
            _check_tokenizer(arguments.to_tokenizer, arguments.trust_remote_code)
    if settings.counts_file is not None:
        with check.flag("save_counts", settings.counts_file):
            check_file(settings.counts_file)
            if settings.counts_file.exists():
                read_json(settings.counts_file)
    if not check.skips(arguments.output):
        with check.flag("output", arguments.output):
            check_folder(arguments.output, "config.json", arguments.model)


def _check_tokenizer(name: str, trust_remote_code: bool) -> None:
    path, _ = locate(name)
    try:
        tokenizer = load_tokenizer(name, trust_remote_code)
    except PrunerError as error:
        raise (PrunerError if Path(path).exists() else Unavailable)(str(error)) from error
    if tokenizer is None:
        raise no_tokenizer(name)


def _check_corpus(sources: list[str], check: InputCheck) -> None:
    """Refuse texts that cannot be read, and a corpus without any text; some of its texts may be empty."""
    has_text = not sources
    for source in sources:
        readable = False
        with check.flag("corpus", source):
            has_text |= any(document.strip() for document in iterate_documents(source, 1))
            readable = True
        has_text |= not readable
    if not has_text:
        raise PrunerError(f"--corpus {','.join(sources)}: the corpus is empty: give texts to count tokens in")
