"""Settings of a recovery run, resolved once from its flags, and frozen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch
from transformers import SchedulerType
from transformers.training_args import OptimizerNames

from ..checkpoint.load import DTYPES
from ..checkpoint.locate import folder_of
from ..choices import Dtype
from ..errors import PrunerError
from ..logs import started_processes
from ..models.dispatch import resolve_device
from ..models.torch_internals import multiplies_bfloat16
from .arguments import ADAPTER_METHODS, RecoverArguments
from .tokenize import ExampleFormat

# Schedules with settings of their own that have no default and no flag.
INCOMPLETE = (
    SchedulerType.COSINE_WITH_MIN_LR,
    SchedulerType.COSINE_WARMUP_WITH_MIN_LR,
    SchedulerType.WARMUP_STABLE_DECAY,
)


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Pruned model and how it is trained.

    Attributes:
        name: folder or hub id.
        compute: dtype of the forward and backward pass.
        weights: dtype of the weights, narrow where they are frozen.
    """

    name: str
    device: str = "cpu"
    compute: torch.dtype = torch.float32
    weights: torch.dtype = torch.float32
    trust_remote_code: bool = False


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """Adapter to train.

    Attributes:
        alpha: the adapter's product is scaled by alpha / rank.
        target_modules: last names of the layers to adapt, such as ``q_proj``; empty for all but the output head.
        base_model: name of the model, for the adapter's config.
    """

    method: Literal["lora", "dora"] = "lora"
    rank: int = 8
    alpha: int = 16
    dropout: float = 0.05
    target_modules: Sequence[str] = ()
    base_model: str = ""


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Data to train and validate on.

    Attributes:
        sources: data sets; empty for what :func:`~.datasets.reachable_sources` gives.
        form: how rows become examples; whether for an encoder-decoder, the model decides.
        shorter_examples: accept examples cut to the model's context length.
        validation_size: examples held out; None for the default.
        validation_texts: texts to validate on as well.
        max_windows: windows of each of these texts; None for all.
        seed: order of a stream.
        streaming: read the sources as iterables.
        cache: keep tokenized data on disk.
    """

    sources: tuple[str, ...] = ()
    form: ExampleFormat = ExampleFormat()
    shorter_examples: bool = False
    validation_size: int | None = None
    validation_texts: tuple[str, ...] = ()
    max_windows: int | None = None
    seed: int = 42
    streaming: bool = False
    cache: bool = False


@dataclass(frozen=True, kw_only=True)
class TeacherSettings:
    """Teacher of a distillation.

    Attributes:
        name: folder or hub id; None for the model that the plan was made for.
        weight: weight of the teacher's loss; that of the labels is 1 minus this.
        hidden: weight of the distance to its last hidden states.
        cache: folder of its outputs; it then runs once, before training.
        top: tokens kept per position in the cache, the most probable ones.
    """

    name: str | None = None
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    weight: float = 0.5
    temperature: float = 1.0
    hidden: float = 0.0
    cache: Path | None = None
    top: int = 64


@dataclass(frozen=True, kw_only=True)
class SelfDataSettings:
    """Training data that the original writes itself.

    Attributes:
        name: folder or hub id of the original; None for the model that the plan was made for.
        rows: rows of each data set to rewrite, the first ones; None for all.
    """

    name: str | None = None
    rows: int | None = None
    device: str = "cpu"
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Optimization of a run.

    Attributes:
        batch_size: examples per optimizer step, over all processes.
        micro_batch_size: examples per forward pass.
        accumulation_steps: forward passes per optimizer step and process.
        max_steps: None for ``num_epochs``.
        warmup_steps: None for 100, at most a tenth of all steps.
    """

    batch_size: int
    micro_batch_size: int
    accumulation_steps: int
    num_epochs: float
    max_steps: int | None
    learning_rate: float
    warmup_steps: int | None
    lr_scheduler_type: str
    weight_decay: float
    optim: str
    gradient_checkpointing: bool
    group_by_length: bool


@dataclass(frozen=True, kw_only=True)
class OutputSettings:
    """Output of a run: folder, checkpoints, intervals.

    Attributes:
        merge: also write the model with the adapter merged into it.
        resume: checkpoint folder to resume from, or ``auto`` for the newest in ``folder``.
        wandb_project: project of Weights & Biases.
    """

    folder: Path
    merge: bool = False
    resume: str | None = None
    eval_steps: int = 100
    save_steps: int = 200
    save_total_limit: int = 3
    logging_steps: int = 10
    report_to: str = "none"
    wandb_project: str | None = None


@dataclass(frozen=True, kw_only=True)
class RecoverySettings:
    """Settings of a recovery run, by concern; all weights are trained where there is no adapter."""

    method: str
    seed: int
    model: ModelSettings
    adapter: AdapterSettings | None
    data: DataSettings
    teacher: TeacherSettings | None
    self_data: SelfDataSettings | None
    training: TrainingSettings
    output: OutputSettings


def resolve_settings(arguments: RecoverArguments) -> RecoverySettings:
    """Check flags and resolve devices, dtypes and defaults that depend on other flags.

    Raises:
        PrunerError: flags exclude or need each other, a value is not valid, or a device does not exist.
    """
    arguments.check()
    schedules = [one.value for one in SchedulerType if one not in INCOMPLETE]
    _check_choice("lr_scheduler_type", arguments.lr_scheduler_type, schedules)
    _check_choice("optim", arguments.optim, [one.value for one in OptimizerNames])
    device = _training_device(arguments.device)
    return RecoverySettings(
        method=arguments.method,
        seed=arguments.seed,
        model=_model_settings(arguments, device),
        adapter=_adapter_settings(arguments),
        data=_data_settings(arguments),
        teacher=_teacher_settings(arguments, device),
        self_data=_self_data_settings(arguments, device),
        training=_training_settings(arguments),
        output=OutputSettings(
            folder=Path(arguments.output),
            merge=arguments.merge,
            resume=arguments.resume_from_checkpoint,
            eval_steps=arguments.eval_steps,
            save_steps=arguments.save_steps,
            save_total_limit=arguments.save_total_limit,
            logging_steps=arguments.logging_steps,
            report_to=arguments.logger,
            wandb_project=arguments.wandb_project,
        ),
    )


def _check_choice(name: str, value: str, choices: list[str]) -> None:
    if value not in choices:
        raise PrunerError(f"--{name} {value!r} is not valid: choose from {', '.join(choices)}")


def _training_device(value: str) -> str:
    device = resolve_device(value, "--device")
    index = torch.device(device).index or 0
    if index > 0:
        raise PrunerError(
            f"--device {device} is not valid: to train on this device alone set CUDA_VISIBLE_DEVICES={index} and give "
            "--device cuda"
        )
    return device


def compute_dtype(dtype: Dtype, device: str) -> torch.dtype:
    """Return the dtype to compute in.

    ``auto`` is bfloat16 where the device multiplies it faster than float32, and else float16 on CUDA and float32 on a
    CPU. Weights that are trained stay in float32.
    """
    if dtype != "auto":
        return cast(torch.dtype, DTYPES[dtype])
    if multiplies_bfloat16(torch.device(device)):
        return torch.bfloat16
    return torch.float16 if device.startswith("cuda") else torch.float32


def _model_settings(arguments: RecoverArguments, device: str) -> ModelSettings:
    compute = compute_dtype(arguments.dtype, device)
    frozen = arguments.method in ADAPTER_METHODS and device.startswith("cuda")
    return ModelSettings(
        name=folder_of(arguments.model),
        device=device,
        compute=compute,
        weights=compute if frozen else torch.float32,
        trust_remote_code=arguments.trust_remote_code,
    )


def _adapter_settings(arguments: RecoverArguments) -> AdapterSettings | None:
    if arguments.method not in ADAPTER_METHODS:
        return None
    model = Path(folder_of(arguments.model))
    return AdapterSettings(
        method=cast(Literal["lora", "dora"], arguments.method),
        rank=arguments.lora_r,
        alpha=arguments.lora_alpha,
        dropout=arguments.lora_dropout,
        target_modules=tuple(arguments.lora_target_modules or ()),
        # An absolute path, so that the adapter finds its model from any working directory; other names stay.
        base_model=str(model.resolve()) if model.exists() else str(model),
    )


def _data_settings(arguments: RecoverArguments) -> DataSettings:
    return DataSettings(
        sources=tuple(arguments.data_path or ()),
        form=ExampleFormat(
            cutoff_len=arguments.cutoff_len or ExampleFormat.cutoff_len,
            template=None if arguments.no_instruction else arguments.prompt_template_name,
            train_on_inputs=arguments.train_on_inputs,
            add_eos_token=arguments.add_eos_token,
            objective=arguments.objective,
            seed=arguments.seed,
            packing=arguments.packing,
            bos=arguments.bos,
        ),
        shorter_examples=arguments.cutoff_len is None,
        validation_size=arguments.val_set_size,
        validation_texts=tuple(arguments.extra_val_dataset or ()),
        max_windows=arguments.max_windows or None,
        seed=arguments.seed,
        streaming=arguments.streaming,
        cache=arguments.cache_dataset,
    )


def _teacher_settings(arguments: RecoverArguments, device: str) -> TeacherSettings | None:
    if not arguments.distills:
        return None
    name, device, dtype = _original(arguments, device)
    return TeacherSettings(
        name=name,
        device=device,
        dtype=dtype,
        weight=arguments.distill_weight,
        temperature=arguments.distill_temperature,
        hidden=arguments.distill_hidden,
        cache=Path(arguments.teacher_cache) if arguments.teacher_cache else None,
        top=arguments.teacher_top,
    )


def _self_data_settings(arguments: RecoverArguments, device: str) -> SelfDataSettings | None:
    if not arguments.self_data:
        return None
    name, device, dtype = _original(arguments, device)
    return SelfDataSettings(name=name, rows=arguments.self_data_rows or None, device=device, dtype=dtype)


def _original(arguments: RecoverArguments, device: str) -> tuple[str | None, str, torch.dtype]:
    """Return name, device and dtype of the original; the name is None for the model that the plan was made for."""
    if arguments.teacher_device != "auto":
        device = resolve_device(arguments.teacher_device, "--teacher_device")
    name = None if arguments.teacher == "auto" else arguments.teacher
    return name, device, compute_dtype(arguments.dtype, device) if device.startswith("cuda") else torch.float32


def _training_settings(arguments: RecoverArguments) -> TrainingSettings:
    processes = started_processes()
    if arguments.batch_size % (arguments.micro_batch_size * processes):
        raise PrunerError(
            f"--batch_size {arguments.batch_size} is not valid: give a multiple of --micro_batch_size "
            f"{arguments.micro_batch_size} times {processes} processes"
        )
    return TrainingSettings(
        batch_size=arguments.batch_size,
        micro_batch_size=arguments.micro_batch_size,
        accumulation_steps=arguments.batch_size // arguments.micro_batch_size // processes,
        num_epochs=arguments.num_epochs,
        max_steps=arguments.max_steps or None,
        learning_rate=arguments.learning_rate,
        warmup_steps=arguments.warmup_steps,
        lr_scheduler_type=arguments.lr_scheduler_type,
        weight_decay=arguments.weight_decay,
        optim=arguments.optim,
        gradient_checkpointing=arguments.gradient_checkpointing,
        group_by_length=arguments.group_by_length,
    )
