"""The flags of ``post_training.py`` and ``llm-pruner recover``: LLM-Pruner's first, then ours."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

import torch
from transformers import SchedulerType
from transformers.training_args import OptimizerNames

from ..arguments import at_least, device_of, flag, folder_of, one_of
from ..checkpoint import DTYPES
from ..errors import PrunerError
from .objectives import OBJECTIVES

METHODS = ("lora", "dora", "full", "distill")
REPORTS = ("none", "tensorboard", "wandb", "trackio")
DEFAULT_DATA = "yahma/alpaca-cleaned"
COUNTS = (
    *("batch_size", "micro_batch_size", "lora_r", "lora_alpha", "teacher_top"),
    *("eval_steps", "save_steps", "save_total_limit", "logging_steps"),
)


@dataclass
class RecoverArguments:
    """Train a pruned model, so that it gets its quality back."""

    prune_model: str = flag(None, "the pruned model: a folder that hf_prune.py or llm_pruner.save wrote")
    data_path: str | None = flag(
        None,
        "training data, by comma: hub data sets, python-docs, c4, ..., or .json, .jsonl, .parquet, .csv or .txt files "
        f"(default: {DEFAULT_DATA}, and python-docs where the hub is out of reach)",
    )
    extra_val_dataset: str | None = flag(None, "texts to validate on as well, by comma: wikitext2, ptb, or files")
    output_dir: str = flag("./lora-alpaca", "folder of the adapter (or the model), its curves and its checkpoints")
    batch_size: int = flag(128, "examples in a step of the optimizer, over all processes")
    micro_batch_size: int = flag(4, "examples in a forward pass")
    num_epochs: float = flag(5, "times to go through the data")
    learning_rate: float = flag(3e-4, "highest learning rate")
    cutoff_len: int = flag(256, "tokens of an example at most")
    val_set_size: int | None = flag(
        None, "examples to validate on (default: 2000, or a twentieth if that is less; 100 with --streaming)"
    )
    prompt_template_name: str = flag("alpaca", "prompt template: alpaca, question, or a .json file")
    no_instruction: bool = flag(False, "use no template")
    lora_r: int = flag(8, "rank of LoRA")
    lora_alpha: int = flag(16, "scale of LoRA: alpha / r")
    lora_dropout: float = flag(0.05, "dropout of LoRA")
    lora_target_modules: str | None = flag(
        None, "linear layers to adapt, by comma, such as q_proj,v_proj (default: every one but the head)"
    )
    train_on_inputs: bool = flag(False, "learn the prompts too")
    add_eos_token: bool = flag(False, "count the end-of-text token of a prompt tokenized on its own")
    group_by_length: bool = flag(False, "put examples of like length together: faster, with an odd training curve")
    cache_dataset: bool = flag(False, "keep tokenized data in datasets/cache, and use it again")
    wandb_project: str | None = flag(None, "report to this project of Weights & Biases")
    resume_from_checkpoint: str | None = flag(None, "a checkpoint folder, or auto: the newest in --output_dir, if any")

    # Ours.
    method: str = flag(
        "lora", "lora, dora, full (all weights), or distill (all weights, from the unpruned model as the teacher)"
    )
    teacher: str | None = flag(
        None, "a model to learn from with any method; auto: the one that was pruned (the default of distill)"
    )
    distill_weight: float = flag(0.5, "share of the teacher in the loss, the rest is that of the labels")
    distill_temperature: float = flag(1.0, "temperature of both in the teacher's part")
    distill_hidden: float = flag(0.0, "weight of the last hidden states' distance from the teacher's")
    teacher_device: str = flag("auto", "device of the teacher (auto: the model's)")
    teacher_cache: str | None = flag(None, "ask the teacher once, before training, and keep its answers in this folder")
    teacher_top: int = flag(64, "most probable tokens of each position in --teacher_cache")
    objective: str = flag("causal", "causal; for encoder-decoders also ul2, d_ul2 or o_ul2")
    merge: bool = flag(False, "write the model with the adapter merged into it to <output_dir>/merged too")
    max_steps: int = flag(0, "stop after this many steps (0: --num_epochs)")
    warmup_steps: int | None = flag(None, "steps to the highest learning rate (default: 100, or a tenth of all)")
    lr_scheduler_type: str = flag("linear", "linear, cosine, constant_with_warmup, ...")
    weight_decay: float = flag(0.0, "weight decay")
    optim: str = flag("adamw_torch", "optimizer, by transformers' name: adamw_torch, adamw_bnb_8bit, ...")
    gradient_checkpointing: bool = flag(False, "compute activations again in the backward pass: less memory, slower")
    packing: bool = flag(
        False, "put answered prompts one after the other into windows of --cutoff_len, as text always is: no padding"
    )
    streaming: bool = flag(False, "read the data as it comes instead of all at once; needs --max_steps")
    eval_steps: int = flag(100, "validate every so many steps")
    save_steps: int = flag(200, "write a checkpoint every so many steps")
    save_total_limit: int = flag(3, "newest checkpoints to keep")
    logging_steps: int = flag(10, "log every so many steps")
    max_windows: int = flag(0, "use only the first N windows of each --extra_val_dataset (0: all)")
    report_to: str = flag("none", "log to as well: " + ", ".join(REPORTS))
    device: str = flag("auto", "device to train on: auto, cpu, cuda (many of them: accelerate launch or torchrun)")
    dtype: str = flag("auto", "compute in: " + ", ".join(DTYPES) + " (auto: float32 on cpu, else the best there is)")
    seed: int = flag(42, "seed of everything that is random")
    trust_remote_code: bool = flag(False, "run modelling code that comes with the checkpoint")

    def check(self) -> None:
        """Refuse what cannot work before anything is loaded.

        Raises:
            PrunerError: with the one line that the user reads.
        """
        if not self.prune_model:
            raise PrunerError("--prune_model is needed: the folder of a pruned model")
        self.prune_model = folder_of(self.prune_model)
        one_of(
            self,
            method=METHODS,
            objective=OBJECTIVES,
            report_to=REPORTS,
            dtype=DTYPES,
            lr_scheduler_type=[kind.value for kind in SchedulerType],
            optim=[name.value for name in OptimizerNames],
        )
        at_least(self, 1, *COUNTS)
        at_least(self, 0, "max_steps", "max_windows", "weight_decay", "distill_hidden", "val_set_size", "warmup_steps")
        if self.batch_size % self.micro_batch_size:
            raise PrunerError(
                f"--batch_size {self.batch_size} is no multiple of --micro_batch_size {self.micro_batch_size}"
            )
        if not self.learning_rate > 0 or (not self.max_steps and not self.num_epochs > 0):
            raise PrunerError("--learning_rate and --num_epochs are above 0")
        if self.cutoff_len < 2:
            raise PrunerError(f"--cutoff_len {self.cutoff_len} is out of range: give at least 2 tokens")
        if not 0 <= self.lora_dropout < 1:
            raise PrunerError(f"--lora_dropout {self.lora_dropout} is out of range: give a share below 1")
        if not 0 <= self.distill_weight <= 1 or not self.distill_temperature > 0:
            raise PrunerError("--distill_weight is between 0 and 1, --distill_temperature above 0")
        if self.save_steps % self.eval_steps:
            raise PrunerError(f"--save_steps {self.save_steps} is no multiple of --eval_steps {self.eval_steps}")
        if self.packing and self.group_by_length:
            raise PrunerError("--packing makes windows of one length: give no --group_by_length")
        if self.streaming and not self.max_steps:
            raise PrunerError("--streaming does not know how much data there is: give --max_steps")
        if self.method == "distill" and self.teacher is None:
            self.teacher = "auto"
        if self.teacher_cache and self.teacher is None:
            raise PrunerError("--teacher_cache goes with --teacher or --method distill")
        if self.teacher_cache and (self.distill_hidden or self.streaming):
            raise PrunerError("--teacher_cache keeps probabilities of data at hand: no --distill_hidden or --streaming")
        if self.merge and self.method in ("full", "distill"):
            raise PrunerError(f"--merge merges an adapter, and --method {self.method} trains the weights themselves")
        if self.wandb_project:
            self.report_to = "wandb"
        packages = [self.report_to] if self.report_to != "none" else []
        packages += ["bitsandbytes"] if "bnb" in self.optim or "8bit" in self.optim else []
        for package in packages:
            if find_spec(package) is None:
                raise PrunerError(f"{package} is not installed: pip install {package}")
        self.device = device_of("device", self.device)
        if (torch.device(self.device).index or 0) > 0:
            raise PrunerError(
                f"--device {self.device}: to train on this one alone set CUDA_VISIBLE_DEVICES="
                f"{torch.device(self.device).index} and give --device cuda"
            )
        other = device_of("teacher_device", self.teacher_device)
        self.teacher_device = self.device if self.teacher_device == "auto" else other
