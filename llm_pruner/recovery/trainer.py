"""Trainer with atomic checkpoints, a stop at the first NaN, and optionally a teacher.

Overrides private methods of ``transformers.Trainer`` (checked with transformers 5.23): ``_run_epoch``,
``_clip_grad_norm``, ``_determine_best_metric``, ``_get_output_dir``, ``_load_from_checkpoint`` and
``_save_checkpoint``.
"""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import EvalLoopOutput, rotate_checkpoints
from transformers.training_args import OptimizerNames

from ..errors import PrunerError, in_one_line
from ..files import DISK, sync_folder
from ..models.loss import IGNORED
from .distill import OF_TEACHER, Teacher, align_labels, forward_inputs

PARTIAL = ".partial-"  # prefix of a checkpoint's folder while it is written


class RecoveryTrainer(Trainer):
    """``Trainer`` for days of training.

    Args:
        teacher: to learn from, beside the labels.
    """

    def __init__(self, *args: Any, teacher: Teacher | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.teacher = teacher
        self._folder: str | None = None

    # --- Learning -----------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if self.teacher is None or not model.training:
            inputs = {key: value for key, value in inputs.items() if key not in OF_TEACHER}
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = self.teacher.loss(model, inputs, num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over processes, tokens counted in all
        return (loss, outputs) if return_outputs else loss

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Train no step if a run resumes from its last step; Trainer alone would train one more."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise self._not_finite("loss", loss.item())
        return loss

    def _clip_grad_norm(self, model: Any) -> Any:
        norm = super()._clip_grad_norm(model)
        # With fp16 the loss scaler skips a step whose gradients overflow; without one the weights would be lost.
        if norm is not None and self.accelerator.scaler is None and not math.isfinite(float(norm)):
            raise self._not_finite("gradient", float(norm))
        return norm

    def _not_finite(self, what: str, value: float) -> PrunerError:
        last = newest_checkpoint(str(self.args.output_dir))
        kept = f"the last good checkpoint is {last}" if last else "no checkpoint exists yet"
        return PrunerError(
            f"the {what} is {value} at step {self.state.global_step + 1}: lower --learning_rate, or give --dtype "
            f"bfloat16 or float32; {kept}"
        )

    @torch.no_grad()
    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Measure the mean loss over all tokens, independent of batches and of the number of processes."""
        model = self.model_wrapped
        self.callback_handler.eval_dataloader = dataloader
        total, tokens, samples = 0.0, 0, 0
        was_training = model.training
        model.eval()
        for inputs in dataloader:
            inputs = self._prepare_inputs(inputs)
            with self.compute_loss_context_manager():
                logits = model(**forward_inputs(inputs), use_cache=False).logits
            sums, counts = [], []
            for row, labels in zip(logits, align_labels(inputs), strict=True):
                mask = labels != IGNORED
                sums.append(cross_entropy(row[mask].float(), labels[mask], reduction="sum"))
                counts.append(mask.sum())
            gathered = self.accelerator.gather_for_metrics((torch.stack(sums), torch.stack(counts)))
            total, tokens = total + gathered[0].cpu().double().sum().item(), tokens + int(gathered[1].sum())
            samples += len(gathered[0])
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        model.train(was_training)
        metrics = {f"{metric_key_prefix}_loss": total / max(tokens, 1)}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=samples)  # type: ignore[arg-type]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Create the optimizer; name the flag where one needs a package or settings that are missing."""
        try:
            return super().create_optimizer(*args, **kwargs)
        except (ImportError, ValueError) as error:
            raise PrunerError(
                f"--optim {OptimizerNames(self.args.optim).value} cannot be used: {in_one_line(error)}"
            ) from error

    # --- Checkpoints ----------------------------------------------------------------------------------------------

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Compare losses of checkpoints alone: Trainer forgets the best of these after a better step in between."""
        return bool(self.control.should_save) and super()._determine_best_metric(metrics, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        try:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, KeyError) as error:
            raise PrunerError(
                f"--resume_from_checkpoint {resume_from_checkpoint} does not fit the model "
                f"({in_one_line(error, 160)}): give the --method and --lora_ flags of the run that wrote it, or another"
                " --output"
            ) from error

    def _get_output_dir(self, trial: Any = None) -> str:
        return self._folder or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any = None) -> None:
        """Write the checkpoint to a temporary folder, sync it to disk, then rename it: an atomic write."""
        home = Path(str(self.args.output_dir))
        step = self.state.global_step
        name = f"checkpoint-{step}"
        partial = home / f"{PARTIAL}{step}"
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        self._folder = str(partial)
        try:
            if self.args.process_index == 0:
                shutil.rmtree(partial, ignore_errors=True)
            self._barrier()
            super()._save_checkpoint(model, trial)
            if self.state.best_global_step == step:
                self.state.best_model_checkpoint = str(home / name)
            if self.args.should_save:
                self.state.save_to_json(str(partial / name / TRAINER_STATE_NAME))
                (partial / name / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing reads
            self._barrier()
            if self.args.local_process_index == 0 and (partial / name).is_dir():
                sync_folder(partial / name)
                shutil.rmtree(home / name, ignore_errors=True)
                os.replace(partial / name, home / name)
                shutil.rmtree(partial, ignore_errors=True)
            self._barrier()
        except Exception as error:
            shutil.rmtree(partial, ignore_errors=True)
            if not isinstance(error, OSError) and not any(sign in str(error) for sign in DISK):
                raise
            last = newest_checkpoint(home)
            raise PrunerError(
                f"cannot write the checkpoint of step {step} to {home}: {error}; "
                + (f"the last good one is {last}" if last else "no other exists yet")
            ) from error
        finally:
            self._folder, self.args.save_total_limit = None, limit
        if self.args.should_save:
            rotate_checkpoints(str(home), limit, self.state.best_model_checkpoint)

    def _barrier(self) -> None:
        if dist.is_available() and dist.is_initialized():
            dist.barrier()


def newest_checkpoint(folder: str | Path) -> Path | None:
    """Return the checkpoint of the latest step in a folder; None without one."""
    steps = {
        int(number): path
        for path in Path(folder).glob("checkpoint-*")
        if (number := path.name.removeprefix("checkpoint-")).isdecimal() and path.is_dir()
    }
    return steps[max(steps)] if steps else None
