"""The recovery run of ``post_training.py`` and ``llm-pruner recover``: load, train, measure, save."""

from __future__ import annotations

import math
import shutil
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ..checkpoint.load import load, load_with_tokenizer
from ..checkpoint.locate import identity
from ..checkpoint.next_steps import log_next_steps
from ..errors import PrunerError
from ..evaluation.perplexity import check_length, title_of_text
from ..evaluation.shared_texts import TRAINED_ON, sources_of, warn_of_shared_texts
from ..files import MODEL_CONFIGS, digest, file_lock, folder_for_run, same_folder
from ..logs import is_first_process, log, logging_to
from ..models.running import context_length
from ..models.skeleton import parameter_count
from ..provenance import command_line, provenance
from ..selection.plan import PruningPlan
from ..version import __version__
from .adapters import make_trainable
from .arguments import DEFAULT_OUTPUT, RecoverArguments
from .callbacks import CurveWriter, TrainingProgress, TrainingTime
from .datasets import WINDOW, padding_collator, predicted_tokens, reachable_sources, training_data, validation_windows
from .distill import DistillationCollator, Teacher, cache_teacher
from .original import kept_tokens, load_plan, original_name, teacher_name
from .resplit import OriginalSplit
from .saving import METRICS_FILE, TEMPORARY, save_recovered
from .self_data import rewritten_sources
from .settings import DataSettings, ModelSettings, OutputSettings, RecoverySettings, resolve_settings
from .tokenize import ExampleFormat, fingerprint
from .trainer import PARTIAL, RecoveryTrainer, newest_checkpoint
from .training_arguments import VALIDATION, training_arguments

LOG_FILE = "recovery.log"


def recover(arguments: RecoverArguments) -> Path:
    """Train a pruned model to regain its quality; return the output folder.

    The folder holds the adapter in peft's format (or the model, with ``--method full`` or ``distill``), the tokenizer,
    ``recovery.json``, ``curves.json``, ``curves.png``, checkpoints, and with ``--merge`` the merged model.

    Raises:
        PrunerError: a flag is not valid, or a model, teacher, data set or folder cannot be used.
    """
    settings = resolve_settings(arguments)
    plan = load_plan(settings.model.name)
    folder = _folder_for(settings, arguments)
    default, settings = settings.output.folder, replace(settings, output=replace(settings.output, folder=folder))
    try:
        with file_lock(folder / LOG_FILE, wait=False) if is_first_process() else nullcontext(folder) as lock:
            if lock is None:
                raise PrunerError(f"another process is training in {folder}: wait for it, or give another --output")
            with logging_to(folder / LOG_FILE, quiet=not is_first_process()):
                if folder != default:
                    log.info("writing to %s: %s holds another run", folder, default)
                log.info("llm-pruner %s: %s", __version__, command_line())
                _run(settings, plan, asdict(arguments))
    except OSError as error:
        raise PrunerError(f"cannot write {folder}: {error.strerror or error}") from error
    return folder


def check_output(folder: Path, model: str) -> None:
    """Refuse a folder that holds the model to train."""
    if same_folder(folder, model):
        raise PrunerError(f"{folder} is the model to be trained: give another --output")


def _folder_for(settings: RecoverySettings, arguments: RecoverArguments) -> Path:
    """Return the folder that the run may write; a resumed run goes on in the folder that the flags name."""
    folder, named = settings.output.folder, arguments.output != DEFAULT_OUTPUT
    check_output(folder, settings.model.name)
    if settings.output.resume is None:
        return folder_for_run(folder, METRICS_FILE, asdict(arguments), named=named)
    if any((folder / name).exists() for name in MODEL_CONFIGS) and not (folder / METRICS_FILE).exists():
        raise PrunerError(f"{folder} holds a model that no run of recover wrote: give another --output")
    return folder


@dataclass(frozen=True, kw_only=True)
class _Data:
    """Training examples, and the texts and all sets to validate on, by name."""

    train: Any
    texts: dict[str, Any]
    evaluation: dict[str, Any]


def _run(settings: RecoverySettings, plan: PruningPlan, flags: dict[str, Any]) -> None:
    set_seed(settings.seed)
    checkpoint = _resumed_checkpoint(settings.output)
    model, tokenizer = _load_model(settings.model)
    if not plan.units and not plan.blocks:
        log.info("%s is not pruned: training it as it is, for comparison", settings.model.name)
    form = _example_format(settings, model)
    settings = replace(settings, data=replace(settings.data, sources=reachable_sources(settings.data)))
    plan.settings[TRAINED_ON] = sorted({*plan.settings.get(TRAINED_ON, ()), *settings.data.sources})
    settings = replace(settings, data=_written_by_the_original(settings, plan, form))
    train, validation = training_data(settings.data, tokenizer, form)
    warn_of_shared_texts(sources_of(plan), settings.data.validation_texts, settings.model.name)
    collate = DistillationCollator(padding_collator(tokenizer, model))
    teacher = None
    if settings.teacher is not None:
        teacher, train = _prepare_teacher(settings, plan, model, train=train, collate=collate, tokenizer=tokenizer)
    parameters = parameter_count(model)
    if settings.adapter is not None and settings.training.gradient_checkpointing:
        model.enable_input_require_grads()
    student = make_trainable(model, settings.adapter)
    texts = {
        title_of_text(name, tokenizer, form.bos): validation_windows(
            name, model, tokenizer, settings.data.max_windows, bos=form.bos
        )
        for name in settings.data.validation_texts
    }
    data = _Data(train=train, texts=texts, evaluation=texts | ({} if validation is None else {VALIDATION: validation}))
    trainer = _make_trainer(settings, student, data, collate=collate, teacher=teacher)
    trainer.add_callback(clock := TrainingTime())
    start_wandb(settings.output)
    outcome = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds = clock.seconds
    final = trainer.evaluate() if data.evaluation else {}
    trained = _gather_weights(trainer, settings)
    if trainer.is_world_process_zero():
        record = {
            "method": settings.method,
            "steps": outcome.global_step,
            "seconds": round(seconds, 1),
            "training_loss": outcome.training_loss,
            **_measurements(trainer, data, final),
            "trained_parameters": sum(p.numel() for p in student.parameters() if p.requires_grad),
            "parameters": parameters,
            "arguments": flags,
            **provenance(settings.seed),
        }
        save_recovered(trained, tokenizer, plan, settings=settings, record=record)
        _log_result(record, settings.output.folder)
        _log_next_steps(settings, plan)
    trainer.accelerator.wait_for_everyone()


def _log_next_steps(settings: RecoverySettings, plan: PruningPlan) -> None:
    folder = settings.output.folder
    log_next_steps(
        folder / "merged" if settings.output.merge else folder,
        "recover",
        original=str(plan.settings.get("base_model", "")),
        compare=[settings.model.name],
        trust_remote_code=settings.model.trust_remote_code,
    )


def _load_model(model: ModelSettings) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return load_with_tokenizer(model.name, model.weights, "cpu", model.trust_remote_code)


def _example_format(settings: RecoverySettings, model: PreTrainedModel) -> ExampleFormat:
    form = replace(settings.data.form, encoder_decoder=bool(model.config.is_encoder_decoder))
    if settings.data.shorter_examples:
        form = replace(form, cutoff_len=min(form.cutoff_len, context_length(model) or form.cutoff_len))
    check_length(model, form.cutoff_len)
    if form.objective != "causal" and not form.encoder_decoder:
        raise PrunerError(
            f"--objective {form.objective} is for encoder-decoders, and {settings.model.name} is a decoder: give causal"
        )
    return form


def _written_by_the_original(settings: RecoverySettings, plan: PruningPlan, form: ExampleFormat) -> DataSettings:
    """Return the data to train on: where the original is to write them, files that it wrote."""
    own = settings.self_data
    if own is None:
        return settings.data
    from accelerate import PartialState

    name = original_name(own.name, plan, settings.model.name)
    with PartialState().main_process_first():
        files = rewritten_sources(
            settings.data.sources, own, name, form, seed=settings.seed, trust=settings.model.trust_remote_code
        )
    return replace(settings.data, sources=files)


def _make_trainer(
    settings: RecoverySettings,
    student: Any,
    data: _Data,
    *,
    collate: DistillationCollator,
    teacher: Teacher | None,
) -> RecoveryTrainer:
    examples = None if settings.data.streaming else len(data.train)
    trainer = RecoveryTrainer(
        model=student,
        args=training_arguments(settings, examples, data.evaluation),
        train_dataset=data.train,
        eval_dataset=data.evaluation or None,
        data_collator=collate,
        callbacks=[CurveWriter()],
        teacher=teacher,
    )
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(TrainingProgress())
    return trainer


def start_wandb(output: OutputSettings) -> None:
    """Start a run of Weights & Biases, which the Trainer then logs to; it takes the project from the environment."""
    if output.wandb_project and is_first_process():
        import wandb

        wandb.init(project=output.wandb_project, name=output.folder.name)


def _gather_weights(trainer: RecoveryTrainer, settings: RecoverySettings) -> Any:
    """Return the trained model with whole weights; every process must call this, since each may hold a part."""
    if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        return trainer.accelerator.unwrap_model(trainer.model)
    state = trainer.accelerator.get_state_dict(trainer.deepspeed if trainer.is_deepspeed_enabled else trainer.model)
    if not trainer.is_world_process_zero():
        return None
    student = make_trainable(_load_model(settings.model)[0], settings.adapter)
    student.load_state_dict(state)
    return student


def _measurements(trainer: RecoveryTrainer, data: _Data, final: dict[str, float]) -> dict[str, Any]:
    return {
        "tokens": trainer.state.num_input_tokens_seen,
        "losses": {name: _first_and_last_loss(trainer.state.log_history, final, name) for name in data.evaluation},
        "texts": {
            name: {"tokens": predicted_tokens(examples), "seq_len": WINDOW} for name, examples in data.texts.items()
        },
    }


def _first_and_last_loss(history: list[dict[str, Any]], final: dict[str, float], name: str) -> list[float | None]:
    key = f"eval_{name}_loss"
    return [next((entry[key] for entry in history if key in entry), None), final.get(key)]


def _log_result(record: dict[str, Any], folder: Path) -> None:
    for name, losses in record["losses"].items():
        first, last = (f"{math.exp(min(loss, 700)):.2f}" if loss is not None else "?" for loss in losses)
        log.info("perplexity on %s: %s -> %s", name, first, last)
    log.info("recovered in %.0f s, %d steps: %s", record["seconds"], record["steps"], folder)


def _resumed_checkpoint(output: OutputSettings) -> Path | None:
    """Return the checkpoint to resume from, and remove half-written files of an interrupted run."""
    if is_first_process():
        for leftover in [*output.folder.glob(f"{PARTIAL}*"), *output.folder.glob(f"{TEMPORARY}*")]:
            shutil.rmtree(leftover, ignore_errors=True)
    checkpoint = find_checkpoint(output.folder, output.resume)
    if output.resume == "auto" and checkpoint is not None:
        log.info("resuming from %s", checkpoint)
    return checkpoint


def find_checkpoint(folder: Path, resume: str | None) -> Path | None:
    """Return the checkpoint that ``--resume_from_checkpoint`` means, None to begin anew.

    Raises:
        PrunerError: no checkpoint has that name, or the folder holds some and none is to be resumed from.
    """
    newest = newest_checkpoint(folder)
    if resume is None and newest is not None:
        raise PrunerError(
            f"{folder} holds checkpoints of an earlier run: add --resume_from_checkpoint auto, or give another --output"
        )
    if resume in (None, "auto"):
        return newest
    checkpoint = Path(str(resume)).expanduser()
    if not (checkpoint / "trainer_state.json").is_file():
        raise PrunerError(f"--resume_from_checkpoint {checkpoint} is not a checkpoint: give one of {folder}, or auto")
    return checkpoint


def _prepare_teacher(
    settings: RecoverySettings,
    plan: PruningPlan,
    model: PreTrainedModel,
    *,
    train: Any,
    collate: DistillationCollator,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[Teacher, Any]:
    """Return the teacher and the training examples, which hold its outputs if these are cached."""
    assert settings.teacher is not None
    name = teacher_name(settings.teacher.name, plan)
    teacher = _load_teacher(settings, plan, name, (model, tokenizer))
    teacher.check(model)
    collate.split = teacher.split
    if settings.teacher.cache is None:
        return teacher, train
    from accelerate import PartialState

    assert teacher.model is not None
    form = _example_format(settings, model)
    key: list[Any] = [
        fingerprint(",".join(settings.data.sources), tokenizer, form),
        _content_hash(train),
        identity(name),
    ]
    key += [settings.teacher.top, settings.teacher.temperature, str(settings.teacher.dtype)]
    key += [] if teacher.tokens is None else teacher.tokens.kept.tolist()
    file = settings.teacher.cache / f"{digest(key)}.arrow"
    with PartialState().main_process_first():
        train = cache_teacher(train, teacher, collate, file, top=settings.teacher.top)
    return replace(teacher, model=None), train


def _content_hash(examples: Any) -> str:
    """Return the hash by which ``datasets`` caches what it makes of a data set (private; checked with datasets 5.2)."""
    return str(examples._fingerprint)


def _load_teacher(
    settings: RecoverySettings, plan: PruningPlan, name: str, student: tuple[PreTrainedModel, PreTrainedTokenizerBase]
) -> Teacher:
    """Load the teacher; one of another vocabulary reads the text in its own tokens if it is a decoder."""
    teacher = settings.teacher
    assert teacher is not None
    pruned, cut = student
    model, tokenizer = load(name, teacher.dtype, teacher.device, settings.model.trust_remote_code)
    theirs, ours = (m.config.get_text_config().vocab_size for m in (model, pruned))
    tokens, split = kept_tokens(plan, theirs, ours), None
    if tokens is not None and tokenizer is not None and cut.is_fast and not model.config.is_encoder_decoder:
        split = OriginalSplit(tokenizer, cut, ours)
    return Teacher(
        model.requires_grad_(False),
        weight=teacher.weight,
        temperature=teacher.temperature,
        hidden=teacher.hidden,
        tokens=tokens,
        split=split,
    )
