"""The recovery run behind ``post_training.py`` and ``llm-pruner recover``: load, train, measure, save."""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ..checkpoint.config import load_config
from ..checkpoint.load import DTYPES, load, load_with_tokenizer
from ..checkpoint.locate import PLAN_FILE, identity, is_adapter, locate
from ..checkpoint.save import write_checkpoint
from ..errors import PrunerError
from ..evaluation.perplexity import check_length
from ..files import complete_folder, digest, file_lock, same_folder, sync_folder
from ..logs import log, logging_to
from ..models.skeleton import parameter_count
from ..provenance import provenance
from ..selection.plan import PruningPlan
from ..version import __version__
from .adapters import trainable
from .arguments import DEFAULT_DATA, RecoverArguments
from .callbacks import Curves, Progress
from .datasets import WINDOW, collator, text_set, training_data
from .distill import Collator, Teacher, answers
from .tokenize import Format, fingerprint
from .trainer import PARTIAL, RecoveryTrainer, newest_checkpoint

VALIDATION = "validation"
CONFIGS = ("config.json", "adapter_config.json", "generation_config.json", "tokenizer_config.json")
FINAL = ".final-"  # prefix of the folder where what was trained is written first
LOG_FILE, METRICS_FILE = "recovery.log", "recovery.json"


def recover(args: RecoverArguments) -> Path:
    """Run what the arguments say; returns the output folder.

    It holds the adapter in peft's format (or the model, with ``--method full`` or ``distill``), the tokenizer,
    ``recovery.json``, ``curves.json``, ``curves.png``, checkpoints, and with ``--merge`` the merged model.

    Raises:
        PrunerError: bad arguments or anything else that the user can mend.
    """
    args.check()
    plan = _plan(args)
    folder = Path(args.output)
    if same_folder(folder, args.model):
        raise PrunerError(f"{folder} is the model to be trained: give another --output")
    if any((folder / name).exists() for name in CONFIGS[:2]) and not (folder / METRICS_FILE).exists():
        raise PrunerError(f"{folder} holds a model that no run of recover wrote: give another --output")
    first = os.environ.get("RANK", "0") == "0"  # of the processes that train together
    try:
        with file_lock(folder / LOG_FILE, wait=False) if first else nullcontext(folder) as alone:
            if alone is None:
                raise PrunerError(f"another process is training in {folder}: wait for it, or give another --output")
            with logging_to(folder / LOG_FILE, quiet=not first):
                log.info("llm-pruner %s: %s", __version__, shlex.join(sys.argv))
                _run(args, plan, folder)
    except OSError as error:
        raise PrunerError(f"cannot write {folder}: {error.strerror or error}") from error
    return folder


def _run(args: RecoverArguments, plan: PruningPlan, folder: Path) -> None:
    set_seed(args.seed)
    resume = _resume(args)
    model, tokenizer = load_with_tokenizer(args.model, _weights(args), "cpu", args.trust_remote_code)
    check_length(model, args.cutoff_len)
    form = Format(
        args.cutoff_len,
        None if args.no_instruction else args.prompt_template_name,
        args.train_on_inputs,
        args.add_eos_token,
        bool(model.config.is_encoder_decoder),
        args.objective,
        args.seed,
        args.packing,
    )
    if args.objective != "causal" and not form.encoder_decoder:
        raise PrunerError(f"--objective {args.objective} is for encoder-decoders, {args.model} is a decoder: causal")
    train, validation = training_data(args, tokenizer, form)
    teacher = _teacher(args, plan, model)
    collate = Collator(collator(tokenizer, model))
    if teacher is not None and args.teacher_cache:
        train = _cache_teacher(args, identity(_teacher_name(args, plan)), teacher, train, collate, tokenizer, form)
        teacher.model = None
    parameters = parameter_count(model)
    student = trainable(args, model)
    texts = {name: text_set(name, args, model, tokenizer) for name in args.extra_val_dataset}
    evaluation = texts | ({VALIDATION: validation} if validation is not None else {})
    trainer = RecoveryTrainer(
        model=student,
        args=_training_arguments(args, train, evaluation),
        train_dataset=train,
        eval_dataset=evaluation or None,
        data_collator=collate,
        callbacks=[Curves()],
        teacher=teacher,
    )
    for shown in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(shown)
    trainer.add_callback(Progress())
    start = time.perf_counter()
    outcome = trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    seconds = time.perf_counter() - start
    final = trainer.evaluate() if evaluation else {}
    parts = None
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:  # every process has some, and has to hand it over
        parts = trainer.accelerator.get_state_dict(trainer.deepspeed if trainer.is_deepspeed_enabled else trainer.model)
    if trainer.is_world_process_zero():
        metrics = {
            "method": args.method,
            "steps": outcome.global_step,
            "seconds": round(seconds, 1),
            "tokens": trainer.state.num_input_tokens_seen,
            "training_loss": outcome.training_loss,
            "trained_parameters": sum(p.numel() for p in student.parameters() if p.requires_grad),
            "losses": {name: _losses(trainer.state.log_history, final, name) for name in evaluation},
            "texts": {name: {"tokens": _predicted(t), "seq_len": WINDOW} for name, t in texts.items()},
            "parameters": parameters,
            "arguments": asdict(args),
            **provenance(args.seed),
        }
        trained = trainer.accelerator.unwrap_model(trainer.model) if parts is None else _whole(args, parts)
        _save(args, trained, tokenizer, plan, folder, metrics)
        for name, losses in metrics["losses"].items():
            first, last = (f"{math.exp(min(x, 700)):.2f}" if x is not None else "?" for x in losses)
            log.info("perplexity on %s: %s -> %s", name, first, last)
        log.info("recovered in %.0f s, %d steps: %s", seconds, outcome.global_step, folder)
    trainer.accelerator.wait_for_everyone()


def _whole(args: RecoverArguments, state: dict[str, torch.Tensor]) -> Any:
    """An ordinary model with the weights of one that lies in parts on several processes."""
    model, _ = load(args.model, _weights(args), "cpu", args.trust_remote_code)
    student = trainable(args, model)
    student.load_state_dict(state)
    return student


def _plan(args: RecoverArguments) -> PruningPlan:
    """The plan by which the model was pruned, from its folder or its repository on the hub."""
    path, _ = locate(args.model)
    file = Path(path) / PLAN_FILE
    if Path(path).is_dir():
        if is_adapter(path):
            raise PrunerError(f"{path} holds an adapter, no pruned model: give the folder that pruning wrote")
        if not file.is_file():
            raise PrunerError(f"{path} is not a pruned model: it has no {PLAN_FILE}")
        return PruningPlan.load(file)
    try:
        return PruningPlan.load(hf_hub_download(path, PLAN_FILE))
    except Exception as error:  # the hub raises whatever it raises
        why = " ".join(str(error).split())[:160]
        raise PrunerError(
            f"there is no pruned model {args.model}: no such folder here, and on the hub no {PLAN_FILE} of that "
            f"name ({type(error).__name__}: {why})"
        ) from error


def _resume(args: RecoverArguments) -> Path | None:
    """The checkpoint to go on from; what an interrupted run left half-written is removed."""
    folder = Path(args.output)
    if os.environ.get("RANK", "0") == "0":
        for left in [*folder.glob(f"{PARTIAL}*"), *folder.glob(f"{FINAL}*")]:
            shutil.rmtree(left, ignore_errors=True)
    newest = newest_checkpoint(folder)
    if args.resume_from_checkpoint is None:
        if newest is not None:
            raise PrunerError(
                f"{folder} holds checkpoints of an earlier run: add --resume_from_checkpoint auto, or give another "
                "--output"
            )
        return None
    if args.resume_from_checkpoint == "auto":
        if newest is not None:
            log.info("going on from %s", newest)
        return newest
    given = Path(args.resume_from_checkpoint)
    if not (given / "trainer_state.json").is_file():
        raise PrunerError(f"{given} is no checkpoint: give one of {folder}, or auto")
    return given


def _compute(args: RecoverArguments) -> torch.dtype:
    asked = DTYPES[args.dtype]
    if isinstance(asked, torch.dtype):
        return asked
    if not args.device.startswith("cuda"):
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def _weights(args: RecoverArguments) -> torch.dtype:
    """Of the model's weights: narrow where they are frozen, wide where they are trained."""
    frozen = args.method in ("lora", "dora") and args.device.startswith("cuda")
    return _compute(args) if frozen else torch.float32


def _teacher(args: RecoverArguments, plan: PruningPlan, model: PreTrainedModel) -> Teacher | None:
    if args.teacher is None:
        return None
    name = _teacher_name(args, plan)
    dtype = _compute(args) if args.teacher_device.startswith("cuda") else torch.float32
    found, _ = load(name, dtype, args.teacher_device, args.trust_remote_code)
    found.requires_grad_(False)
    teacher = Teacher(found, args.distill_weight, args.distill_temperature, args.distill_hidden)
    teacher.check(model)
    return teacher


def _teacher_name(args: RecoverArguments, plan: PruningPlan) -> str:
    name = str(plan.settings.get("base_model", "")) if args.teacher == "auto" else str(args.teacher)
    if not name:
        raise PrunerError("the plan does not say which model was pruned: give it as --teacher")
    return name


def _cache_teacher(
    args: RecoverArguments,
    who: list[Any],
    teacher: Teacher,
    data: Any,
    collate: Collator,
    tokenizer: PreTrainedTokenizerBase,
    form: Format,
) -> Any:
    """The data with the teacher's answers, from ``--teacher_cache`` or into it."""
    from accelerate import PartialState

    assert teacher.model is not None
    told = [fingerprint(",".join(args.data_path) or DEFAULT_DATA, tokenizer, form), data._fingerprint, who]
    told += [args.teacher_top, args.distill_temperature]
    file = Path(str(args.teacher_cache)) / f"{digest(told)}.arrow"
    with PartialState().main_process_first():
        return answers(data, teacher.model, collate, args.teacher_top, args.distill_temperature, file)


def _training_arguments(args: RecoverArguments, train: Any, evaluation: dict[str, Any]) -> TrainingArguments:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if args.batch_size % (args.micro_batch_size * processes):
        raise PrunerError(
            f"--batch_size {args.batch_size} is no multiple of --micro_batch_size {args.micro_batch_size} times "
            f"{processes} processes"
        )
    steps = args.max_steps or math.ceil(math.ceil(len(train) / args.batch_size) * args.num_epochs)
    if args.wandb_project:
        os.environ["WANDB_PROJECT"] = args.wandb_project
    compute = _compute(args)
    best = VALIDATION in evaluation and (steps >= args.save_steps)
    settings = TrainingArguments(
        output_dir=args.output,
        per_device_train_batch_size=args.micro_batch_size,
        per_device_eval_batch_size=args.micro_batch_size,
        gradient_accumulation_steps=args.batch_size // args.micro_batch_size // processes,
        num_train_epochs=args.num_epochs,
        max_steps=args.max_steps or -1,
        learning_rate=args.learning_rate,
        lr_scheduler_type=args.lr_scheduler_type,
        warmup_steps=min(100, steps // 10) if args.warmup_steps is None else args.warmup_steps,
        weight_decay=args.weight_decay,
        optim=args.optim,
        bf16=compute is torch.bfloat16,
        fp16=compute is torch.float16,
        gradient_checkpointing=args.gradient_checkpointing or None,
        log_level="error",
        train_sampling_strategy="group_by_length" if args.group_by_length else "random",
        logging_steps=args.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="non_padding",
        eval_strategy="steps" if evaluation else "no",
        eval_steps=args.eval_steps,
        eval_on_start=bool(evaluation),
        prediction_loss_only=True,
        save_strategy="steps",
        save_steps=args.save_steps,
        save_total_limit=args.save_total_limit,
        load_best_model_at_end=best,
        metric_for_best_model=f"eval_{VALIDATION}_loss" if best else None,
        greater_is_better=False if best else None,
        report_to=args.report_to,
        run_name=Path(args.output).name,
        project=args.wandb_project or "huggingface",
        remove_unused_columns=False,
        use_cpu=args.device == "cpu",
        seed=args.seed,
        data_seed=args.seed,
    )
    settings._n_gpu = min(settings.n_gpu, 1)  # several GPUs are for several processes, not for DataParallel
    return settings


def _predicted(windows: Any) -> int:
    """Tokens that a loss is taken of: of a decoder's window all but the first."""
    return sum(len(row) - (len(row) == WINDOW) for row in windows["labels"])


def _losses(history: list[dict[str, Any]], final: dict[str, float], name: str) -> list[float | None]:
    """The first and the last loss of a validation set."""
    key = f"eval_{name}_loss"
    return [next((entry[key] for entry in history if key in entry), None), final.get(key)]


def _in_order(file: Path) -> None:
    """peft writes sets as they come; equal runs are to leave equal files."""
    config = json.loads(file.read_text(encoding="utf-8"))
    config = {
        name: sorted(v) if name.startswith("target_") and isinstance(v, list) else v for name, v in config.items()
    }
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _save(
    args: RecoverArguments,
    student: Any,
    tokenizer: PreTrainedTokenizerBase,
    plan: PruningPlan,
    folder: Path,
    metrics: dict[str, Any],
) -> None:
    """Write what was trained: first beside, then moved into the output folder, which checkpoints share."""
    stored = load_config(args.model, args.trust_remote_code).dtype or torch.float32
    with tempfile.TemporaryDirectory(prefix=FINAL, dir=folder) as made:
        temporary = Path(made)
        student.config.use_cache = True
        if args.method in ("lora", "dora"):
            student.save_pretrained(temporary)
            (temporary / "README.md").unlink(missing_ok=True)  # peft's, an empty form
            _in_order(temporary / "adapter_config.json")
            tokenizer.save_pretrained(temporary)
        else:
            write_checkpoint(student.to(stored), tokenizer, temporary, plan, cut=True)
        (temporary / METRICS_FILE).write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
        sync_folder(temporary)
        for name in CONFIGS:  # without one there is no model, until the last is there again
            (folder / name).unlink(missing_ok=True)
        for file in sorted(temporary.iterdir(), key=lambda f: f.name in CONFIGS):
            file.chmod(0o644)
            os.replace(file, folder / file.name)
    if args.merge:
        with complete_folder(folder / "merged", owned_if="config.json") as temporary:
            merged = student.merge_and_unload(safe_merge=True)
            write_checkpoint(merged.to(stored), tokenizer, temporary, plan, cut=True)
