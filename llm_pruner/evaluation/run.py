"""Run ``llm-pruner evaluate`` and the evaluations of recipes, and write their files."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from ..checkpoint.load import load, load_with_tokenizer
from ..checkpoint.locate import locate
from ..corpora import text
from ..files import file_for_run, folder_for_run, strict_json, write_text
from ..logs import logging_to
from ..media import is_media
from ..models.dispatch import resolve_device
from ..provenance import provenance
from ..serving.engines import in_format, measure_engines
from .arguments import EvaluateArguments, PerplexityArguments
from .evaluate import Evaluation, Measurements, evaluate_models, keep_outputs
from .generation import QUALITY_PROMPTS
from .names import EVALUATION_FILE, TABLE_FILES
from .perplexity import perplexity, title_of_text, windows
from .shared_texts import warn_for_models
from .similarity import Originals
from .table import Table, as_json, table
from .tabular import TERMINAL, terminal_tables
from .together import fit_together
from .zero_shot import Prompting, zero_shot_in_vllm


def measure(args: EvaluateArguments, *, against: str | None = None, task: str | None = None) -> list[Evaluation]:
    """Measure the models that the arguments name, side by side.

    Args:
        against: model to compare the outputs of all of them with (default: the first of them).
        task: task whose class ``against`` is loaded in, instead of the declared class.

    Raises:
        PrunerError: the arguments are not valid, or a model, text or task is not available.
    """
    args.check()
    device = resolve_device(args.device, "--device")
    for model in args.model:
        locate(model)
    warn_for_models(args.model, args.datasets)

    def load_model(name: str, task: str | None = args.task) -> Any:
        return load(name, args.dtype, device, args.trust_remote_code, verify=args.verify, task=task)

    together = (
        args.tokens > 0
        and len(args.model) > 1
        and fit_together(
            args.model, dtype=args.dtype, device=device, trust_remote_code=args.trust_remote_code, task=args.task
        )
    )
    settings, originals = resolve(args), Originals()
    if against is not None:
        keep_outputs(load_model(against, task or args.task), settings, originals)
    evaluations = evaluate_models(args.model, load_model, settings, together=together, originals=originals)
    if args.engine is None:
        return evaluations
    timed = measure_engines(args.engine, args.model, trust_remote_code=args.trust_remote_code)
    evaluations = [replace(one, engine=speed) for one, speed in zip(evaluations, timed, strict=True)]
    return [_with_tasks_in_vllm(one, args) for one in evaluations] if _runs_tasks_in_vllm(args) else evaluations


def _runs_tasks_in_vllm(args: EvaluateArguments) -> bool:
    return args.engine == "vllm" and bool(args.tasks)


def _with_tasks_in_vllm(evaluation: Evaluation, args: EvaluateArguments) -> Evaluation:
    """Return an evaluation with accuracies of a model that vLLM runs."""
    with in_format("vllm", evaluation.model, args.trust_remote_code) as folder:
        measured = zero_shot_in_vllm(
            folder,
            args.tasks,
            include_path=args.include_path,
            limit=args.limit,
            num_fewshot=args.num_fewshot,
            prompting=prompting_of(args),
        )
    tasks = evaluation.tasks | measured.tasks
    return replace(evaluation, tasks=tasks, results=measured.results, questions=measured.questions)


def resolve(args: EvaluateArguments) -> Measurements:
    """Turn flags into settings, reading the texts that they name.

    Raises:
        PrunerError: a text cannot be read.
    """
    return Measurements(
        texts={name: text(name, "test") for name in args.datasets if not is_media(name)},
        media=tuple(name for name in args.datasets if is_media(name)),
        seq_len=args.seq_len,
        stride=args.stride or None,
        bos=args.bos,
        max_windows=args.max_windows or None,
        batch_size=args.batch_size or None,
        tasks=() if _runs_tasks_in_vllm(args) else tuple(args.tasks),
        labelled=tuple(args.labelled),
        include_path=args.include_path,
        limit=args.limit,
        num_fewshot=args.num_fewshot,
        prompting=prompting_of(args),
        tokens=args.tokens,
        batch=args.batch,
        new_tokens=args.new_tokens,
        prompts=QUALITY_PROMPTS if args.samples else (),
    )


def prompting_of(args: EvaluateArguments) -> Prompting:
    """Return the settings that are passed on to lm-eval."""
    return Prompting(
        apply_chat_template=args.apply_chat_template,
        system_instruction=args.system_instruction,
        gen_kwargs=args.gen_kwargs,
        confirm_run_unsafe_code=args.confirm_run_unsafe_code,
    )


def run_evaluate(args: EvaluateArguments) -> None:
    """Run ``llm-pruner evaluate``: print one table, and write it in every format to ``--output``.

    Raises:
        PrunerError: as :func:`measure`, or ``--output`` holds another run.
    """
    args.check()
    folder = Path(args.output) if args.output else None
    if folder is not None:
        folder_for_run(folder, EVALUATION_FILE, asdict(args), named=True, beside_models=True)
    with logging_to(None):
        evaluations = measure(args)
    combined = table(evaluations)
    console = Console()
    for part in terminal_tables(combined.cells(TERMINAL), console.width):
        console.print(part)
    for note in combined.notes:
        console.print(note, markup=False)  # it may name a model
    if folder is not None:
        write_evaluations(evaluations, combined, folder, asdict(args))


def run_perplexity(args: PerplexityArguments) -> None:
    """Run ``evaluate/perplexity.py``: print the perplexity, and write it to ``--output``.

    Raises:
        PrunerError: an argument is not valid, the model or text is not available, or ``--output`` holds something else.
    """
    args.check()
    file = Path(args.output) if args.output else None
    if file is not None:
        file_for_run(file, asdict(args))
    with logging_to(None):
        warn_for_models([args.model], [args.dataset])
    content = text(args.dataset, "test")
    device = resolve_device(args.device, "--device")
    model, tokenizer = load_with_tokenizer(args.model, args.dtype, device, args.trust_remote_code, verify=args.verify)
    stride = args.stride or None
    ids = windows(tokenizer, content, args.seq_len, args.max_windows or None, stride=stride, bos=args.bos)
    result = perplexity(
        model,
        ids,
        args.batch_size or None,
        stride=stride,
        tokenizer=tokenizer,
        model_name=args.model,
        text_name=args.dataset,
    )
    title = title_of_text(args.dataset, tokenizer, args.bos)
    record = {"model": args.model, "dataset": title, **asdict(result), "arguments": asdict(args)}
    print(f"{args.model} on {title}: perplexity {result.perplexity:.4f} ({result.tokens} tokens)")
    if file is not None:
        write_text(file, strict_json(record))


def write_evaluations(evaluations: list[Evaluation], combined: Table, folder: Path, arguments: dict[str, Any]) -> None:
    """Write the table in every format, its numbers with the arguments of the run, and lm-eval's own records."""
    files = {EVALUATION_FILE: as_json(evaluations, {"arguments": arguments, **provenance()})}
    files |= zip(TABLE_FILES, (combined.csv(), combined.markdown(), combined.latex()), strict=True)
    for i, one in enumerate(evaluations):
        if one.results:
            files[f"lm_eval/{i}_{Path(one.model).name}.json"] = strict_json(one.results)
    for name, content in files.items():
        write_text(folder / name, content)
