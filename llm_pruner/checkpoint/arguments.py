"""Flags of ``llm-pruner apply`` and ``llm-pruner to-uniform``."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import PrunerError
from ..flags import Arguments, flag


@dataclass(kw_only=True)
class ApplyArguments(Arguments):
    """Flags of ``llm-pruner apply``."""

    plan: str = flag("", "plan to apply: pruning_plan.json of a run")
    model: str = flag("", "model that the plan is for: a folder of safetensors files", aliases=("checkpoint",))
    output: str = flag("", "folder to write", aliases=("out",))
    verify: bool = flag(False, "refuse a plan that was changed after it was written, and check the written files")
    standalone: bool = flag(False, "also write a modelling file, so that per-layer checkpoints load without llm_pruner")
    dequantize: bool = flag(False, "write a quantized model in 16 bits (default: slice its quantized files)")
    trust_remote_code: bool = flag(False, "run modelling code that comes with the checkpoint")
    quiet: bool = flag(False, "show no progress and no log, only results, warnings and errors")
    refit: bool = flag(False, "load the model and repeat the plan's changes of weights (--refit, --rescale_norms)")
    calib_dataset: str | None = flag(
        None,
        "calibration set of --refit: a text, as prune takes it, or a folder of images or sounds (default: that of the "
        "run)",
    )
    task: str | None = flag(
        None, "load the class of this task, such as text-generation (default: that of the plan's run)"
    )

    def check(self) -> None:
        """Refuse missing paths, and a calibration text that nothing reads.

        Raises:
            PrunerError: plan, model or output is missing, or --calib_dataset is given without --refit.
        """
        if self.calib_dataset is not None and not self.refit:
            raise PrunerError(f"--calib_dataset {self.calib_dataset} has no effect without --refit: add it")
        if not (self.plan and self.model and self.output):
            raise PrunerError("give a plan, a checkpoint and a folder to write: llm-pruner apply PLAN MODEL OUTPUT")


@dataclass(kw_only=True)
class UniformArguments(Arguments):
    """Flags of ``llm-pruner to-uniform``."""

    model: str = flag("", "folder of a pruned model whose layers have different widths", aliases=("checkpoint",))
    output: str = flag(
        "", "folder to write; its model has the same logits, and every layer is as wide as the widest", aliases=("out",)
    )
    allow_padding: bool = flag(False, "pad even if that adds back more than half of the removed parameters")
    trust_remote_code: bool = flag(False, "run modelling code that comes with the checkpoint")

    def check(self) -> None:
        """Refuse missing paths.

        Raises:
            PrunerError: model or output is missing.
        """
        if not (self.model and self.output):
            raise PrunerError("give a checkpoint and a folder to write: llm-pruner to-uniform MODEL OUTPUT")
