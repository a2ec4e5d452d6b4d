"""The Trainer's arguments, from a run's settings."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from transformers import TrainingArguments

from ..errors import PrunerError
from .settings import OutputSettings, RecoverySettings, TrainingSettings

VALIDATION = "validation"  # name of the examples held out of the training data
MAX_WARMUP_STEPS = 100
OF_THE_LOSS = ("reduce_lr_on_plateau", "greedy")  # schedules that lower the rate by the validation loss


def training_arguments(
    settings: RecoverySettings, examples: int | None, evaluated: Collection[str]
) -> TrainingArguments:
    """Return the Trainer's arguments.

    Args:
        examples: training examples; None for a stream, which has ``max_steps``.
        evaluated: names of the validation sets.
    """
    training, output = settings.training, settings.output
    if training.lr_scheduler_type in OF_THE_LOSS and VALIDATION not in evaluated:
        raise PrunerError(
            f"--lr_scheduler_type {training.lr_scheduler_type} follows the validation loss, and no examples are held "
            "out: give a --val_set_size above 0"
        )
    steps = training.max_steps or math.ceil(math.ceil((examples or 0) / training.batch_size) * training.num_epochs)
    arguments = TrainingArguments(
        output_dir=str(output.folder),
        use_cpu=settings.model.device == "cpu",
        bf16=settings.model.compute is torch.bfloat16,
        fp16=settings.model.compute is torch.float16,
        seed=settings.seed,
        data_seed=settings.seed,
        remove_unused_columns=False,
        **_optimization(training, steps),
        **_evaluation(output, steps, evaluated),
        **_logging(output),
    )
    return _without_data_parallel(arguments)


def _optimization(training: TrainingSettings, steps: int) -> dict[str, Any]:
    warmup_steps = min(MAX_WARMUP_STEPS, steps // 10) if training.warmup_steps is None else training.warmup_steps
    return {
        "per_device_train_batch_size": training.micro_batch_size,
        "per_device_eval_batch_size": training.micro_batch_size,
        "gradient_accumulation_steps": training.accumulation_steps,
        "num_train_epochs": training.num_epochs,
        "max_steps": training.max_steps or -1,
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": training.lr_scheduler_type,
        "warmup_steps": warmup_steps,
        "weight_decay": training.weight_decay,
        "optim": training.optim,
        "gradient_checkpointing": training.gradient_checkpointing or None,
        "train_sampling_strategy": "group_by_length" if training.group_by_length else "random",
    }


def _evaluation(output: OutputSettings, steps: int, evaluated: Collection[str]) -> dict[str, Any]:
    keep_best = VALIDATION in evaluated and steps >= output.save_steps
    return {
        "eval_strategy": "steps" if evaluated else "no",
        "eval_steps": output.eval_steps,
        "eval_on_start": bool(evaluated),
        "prediction_loss_only": True,
        "save_strategy": "steps",
        "save_steps": output.save_steps,
        "save_total_limit": output.save_total_limit,
        "load_best_model_at_end": keep_best,
        "metric_for_best_model": f"eval_{VALIDATION}_loss" if VALIDATION in evaluated else None,
        "greater_is_better": False if VALIDATION in evaluated else None,
    }


def _logging(output: OutputSettings) -> dict[str, Any]:
    return {
        "log_level": "error",
        "logging_steps": output.logging_steps,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "include_num_input_tokens_seen": "non_padding",
        "report_to": output.report_to,
        "run_name": output.folder.name,
        "project": output.wandb_project or "huggingface",
    }


def _without_data_parallel(arguments: TrainingArguments) -> TrainingArguments:
    """Keep the Trainer from using ``DataParallel``: each process uses one GPU.

    Sets the private ``_n_gpu``, which has no public flag (checked with transformers 5.23).
    """
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments
