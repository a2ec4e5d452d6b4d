"""The run behind ``llm-pruner vocab``: count, choose, cut, compare, save."""

from __future__ import annotations

import itertools
import json
import math
import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoint.card import write_card
from ..checkpoint.load import load_tokenizer, load_with_tokenizer
from ..checkpoint.locate import PLAN_FILE
from ..checkpoint.save import write_checkpoint
from ..data import text
from ..errors import PrunerError
from ..evaluation.perplexity import windows
from ..files import complete_folder, write_text
from ..graph.units import trace
from ..logs import log, logging_to
from ..models.dispatch import resolve_device
from ..models.loss import total_loss
from ..models.running import context_length, evaluating
from ..models.skeleton import parameter_count
from ..provenance import provenance
from ..selection.plan import PruningPlan
from ..surgery.apply import apply
from ..surgery.config.token_ids import ids_in
from ..surgery.tokenizer import Subwords, keeps_words
from .arguments import VocabArguments
from .choosing import choose, in_scripts, of_tokenizer, scripts_of
from .counting import Counts, count, iterate_documents

LOG_FILE, METRICS_FILE = "vocabulary.log", "vocabulary.json"
DOCUMENTS, COMPARED_TOKENS, NEW_TOKENS = 32, 64, 16  # compared bit by bit
PIECE = 200  # characters of what is compared
WINDOW = 128


@dataclass
class Comparison:
    """What cutting the vocabulary changed, on a text that was not counted.

    Attributes:
        tokenized_otherwise: share of pieces of text whose tokens are others than before.
        fertility_before, fertility_after: tokens for each word between blanks.
        identical: of the pieces tokenized as before, those whose logits on kept tokens are the same to the bit.
        largest_difference: between two such logits.
        generations_equal: of the same pieces, those after which the same tokens are written, if all of them stay.
        perplexity_before, perplexity_after: for each byte of the text, which compares between tokenizers.
    """

    pieces: int
    tokenized_otherwise: float
    fertility_before: float
    fertility_after: float
    compared: int
    identical: int
    largest_difference: float
    generations_equal: int
    generations: int
    perplexity_before: float
    perplexity_after: float


def prune_vocabulary(args: VocabArguments) -> Path:
    """Run what the arguments say; returns the folder of the new checkpoint.

    Raises:
        PrunerError: bad arguments or anything else that the user can mend.
    """
    args.check()
    held_out = text(args.eval_dataset, "test")
    if not held_out.strip():
        raise PrunerError(f"--eval_dataset {args.eval_dataset} has no text to compare both models on")
    for source in args.corpus:  # a missing one is found out before anything is loaded
        next(iterate_documents(source, 1), None)
    model, tokenizer = load_with_tokenizer(
        args.model, args.dtype, resolve_device(args.device, "--device"), args.trust_remote_code
    )
    kept = kept_tokens(args, model, tokenizer)
    graph = trace(model)
    units = graph.of_kind("vocabulary")
    if len(units) != 1:
        why = next((u.frozen for u in graph.frozen if "vocabulary" in u.name), "it has several, or none")
        raise PrunerError(f"the vocabulary of {type(model).__name__} cannot be cut: {why}")
    unit = units[0]
    plan = PruningPlan(settings={"base_model": args.model, "command": shlex.join(sys.argv)})
    plan.keep(unit, torch.tensor(kept), graph.shapes)
    pruned = apply(model, plan)
    before, after = parameter_count(model), parameter_count(pruned)
    with (
        complete_folder(args.output, owned_if="config.json", reads=args.model) as folder,
        logging_to(folder / LOG_FILE),
    ):
        log.info("tokens: %d -> %d; parameters: %d -> %d (%.4f)", unit.size, len(kept), before, after, after / before)
        write_checkpoint(pruned, tokenizer, folder, plan)
        smaller = AutoTokenizer.from_pretrained(folder)
        found = compare_vocabularies((model, tokenizer), (pruned, smaller), kept, held_out, args.max_windows or None)
        for name, value in asdict(found).items():
            log.info("%s: %s", name, round(value, 4) if isinstance(value, float) else value)
        metrics: dict[str, Any] = {"tokens_before": unit.size, "tokens_after": len(kept), "parameters_before": before}
        metrics |= {"parameters_after": after, "comparison": asdict(found), "arguments": asdict(args), **provenance()}
        write_text(folder / METRICS_FILE, json.dumps(metrics, indent=1) + "\n")
        write_card(pruned.config, folder, PruningPlan.load(folder / PLAN_FILE), Path(args.output).name)
    print(args.output)
    return Path(args.output)


def kept_tokens(args: VocabArguments, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that stay by what the arguments say."""
    words = Subwords(tokenizer)
    named = ids_in(model.config) | (ids_in(model.generation_config) if model.can_generate() else set())
    protected = {i for i in named if i in words.tokens} | _of_template(tokenizer) | _in_file(args, words, tokenizer)
    found = Counts(words.size)
    if args.corpus:
        found = count(tokenizer, args.corpus, args.save_counts, args.max_documents or None)
    wanted: set[int] | None = None
    if args.to_tokenizer:
        other = load_tokenizer(args.to_tokenizer, trust_remote_code=args.trust_remote_code)
        if other is None:
            raise PrunerError(f"--to_tokenizer {args.to_tokenizer} has no tokenizer")
        wanted = of_tokenizer(words, Subwords(other))
    if args.languages or args.scripts:
        scripts = list(args.scripts)
        scripts += scripts_of(args.languages)
        written = in_scripts(words, tokenizer, scripts)
        wanted = written if wanted is None else wanted & written
    whole = found.words if words.by_words and keeps_words(tokenizer, model.config) else None
    return choose(words, found.values, args.keep or "1.0", args.min_count, protected, wanted, whole)


def _of_template(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens of a conversation's frame."""
    if not tokenizer.chat_template:
        return set()
    roles = [{"role": role, "content": ""} for role in ("system", "user", "assistant")]
    for messages in (roles, roles[1:]):
        try:
            frame = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            return set(tokenizer(str(frame), add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]
        except Exception:  # templates refuse what they like
            continue
    return set()


def _in_file(args: VocabArguments, words: Subwords, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that a file lists, one a line, as the tokenizer writes them or as text."""
    if not args.keep_tokens:
        return set()
    try:
        lines = Path(args.keep_tokens).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PrunerError(f"cannot read {args.keep_tokens}: {error}") from error
    out: set[int] = set()
    for line in filter(None, lines):
        found = [words.ids[line]] if line in words.ids else tokenizer(line, add_special_tokens=False)["input_ids"]
        out.update(cast(list[int], found))
    return out


@torch.no_grad()
def compare_vocabularies(
    original: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    pruned: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    kept: list[int],
    held_out: str,
    max_windows: int | None = None,
) -> Comparison:
    """Both models on a text."""
    (model, large), (smaller, small) = original, pruned
    new = {old: position for position, old in enumerate(kept)}
    pieces = [held_out[i : i + PIECE] for i in range(0, min(len(held_out), 5000 * PIECE), PIECE)]
    before, after = (
        [e.ids for e in cast(Any, t).backend_tokenizer.encode_batch_fast(pieces, add_special_tokens=False)]
        for t in (large, small)
    )
    same = [[new.get(i) for i in a] == b for a, b in zip(before, after, strict=True)]
    longest = min(COMPARED_TOKENS, (context_length(model) or 2**31) - NEW_TOKENS)
    compared = list(
        itertools.islice((ids for ids, s in zip(before, same, strict=True) if s and len(ids) > 1), DOCUMENTS)
    )
    identical, largest, equal, generations = 0, 0.0, 0, 0
    columns = torch.tensor(kept, device=model.device)
    for ids in compared:
        there = torch.tensor([ids[:longest]], device=model.device)
        moved = torch.tensor([[new[i] for i in ids[:longest]]], device=smaller.device)
        with evaluating(model), evaluating(smaller):
            both = [m(**_inputs(m, x)).logits for m, x in ((model, there), (smaller, moved))]
            difference = (both[0][..., columns] - both[1]).abs().max().item()
            largest, identical = max(largest, difference), identical + (difference == 0)
            written = [_written(m, x) for m, x in ((model, there), (smaller, moved))]
        expected = [new.get(i) for i in written[0]]
        if None not in expected:
            generations += 1
            equal += expected == written[1]
    blanks = sum(len(piece.split()) for piece in pieces)
    read = _beginning(model, large, held_out, max_windows) if max_windows else held_out
    return Comparison(
        len(pieces),
        1 - sum(same) / len(pieces),
        sum(map(len, before)) / blanks,
        sum(map(len, after)) / blanks,
        len(compared),
        identical,
        largest,
        equal,
        generations,
        byte_perplexity(model, large, read),
        byte_perplexity(smaller, small, read),
    )


def _window(model: PreTrainedModel) -> int:
    """Tokens read at once to measure a model."""
    return min(WINDOW, context_length(model) or WINDOW)


def _beginning(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, held_out: str, max_windows: int) -> str:
    """What so many windows of the original cover: both models read the same text, each in its own tokens."""
    length = _window(model)
    ids = tokenizer(held_out, truncation=False, verbose=False)["input_ids"]
    end = max_windows * length + length // 2  # what is cut in the middle may be other tokens, and a few fewer
    return str(tokenizer.decode(cast(list[int], ids)[:end], skip_special_tokens=True))


def _inputs(model: PreTrainedModel, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": ids, "decoder_input_ids": ids} if model.config.is_encoder_decoder else {"input_ids": ids}


def _written(model: PreTrainedModel, ids: torch.Tensor) -> list[int]:
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "pad_token_id": 0}
    out = cast(Any, model).generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
    return out[0, 0 if model.config.is_encoder_decoder else ids.shape[1] :].tolist()


def byte_perplexity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, held_out: str) -> float:
    """exp of the mean loss for each byte of a text in UTF-8, every token predicted once but the first of all.

    Windows overlap by one token, which the next one begins with.
    """
    length = _window(model)
    both_sides = model.config.is_encoder_decoder  # reads the first half of a window and predicts the second
    ids = windows(tokenizer, held_out, length, stride=None if both_sides else length - 1)
    with evaluating(model):
        total, _ = total_loss(model, ids.to(model.device).split(8))
    predicted = ids[:, length // 2 :].flatten() if both_sides else torch.cat([ids[0, 1:], ids[1:, 1:].flatten()])
    return math.exp(total / max(1, len(str(tokenizer.decode(predicted.tolist())).encode())))
