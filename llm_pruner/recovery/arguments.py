"""Flags of ``post_training.py`` and ``llm-pruner recover``: LLM-Pruner's, then this project's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..choices import ADAPTER_METHODS, Dtype
from ..errors import PrunerError
from ..flags import Arguments, Share, check_at_least, check_combinations, flag
from ..optional import is_installed, require

DEFAULT_DATA = "yahma/alpaca-cleaned"
DEFAULT_OUTPUT = "./lora-alpaca"
COUNTS = (
    *("batch_size", "micro_batch_size", "lora_r", "lora_alpha", "teacher_top"),
    *("eval_steps", "save_steps", "save_total_limit", "logging_steps"),
)
COUNTS_FROM_0 = ("max_steps", "max_windows", "self_data_rows", "val_set_size", "warmup_steps")
# Flags that cannot be given together, and why.
EXCLUSIVE = (
    (("packing",), ("group_by_length",), "packed windows have one length"),
    (("streaming",), ("group_by_length",), "the lengths of a stream's examples are not known before they are read"),
    (("teacher_cache",), ("distill_hidden",), "the cache holds probabilities, no hidden states"),
    (("teacher_cache",), ("streaming",), "the teacher runs over all data before training"),
    (("self_data",), ("streaming",), "the original writes all rows before training"),
)
# Flags that need one of others.
REQUIRES = (
    ("streaming", ("max_steps",)),
    ("self_data_rows", ("self_data",)),
    ("teacher_top", ("teacher_cache",)),
    ("max_windows", ("extra_val_dataset",)),
)
OF_A_TEACHER = ("teacher_cache", "distill_weight", "distill_temperature", "distill_hidden")


@dataclass(kw_only=True)
class RecoverArguments(Arguments):
    """Flags of ``llm-pruner recover``."""

    model: str = flag(
        "",
        "model to train: a folder written by prune or llm_pruner.save, or an unpruned one, for comparison",
        group="model",
        aliases=("prune_model",),
    )
    device: str = flag(
        "auto", "device: auto, cpu, cuda, mps (several GPUs: accelerate launch or torchrun)", group="model"
    )
    dtype: Dtype = flag(
        "auto",
        "dtype to compute in (auto: bfloat16 where the processor multiplies it, else float32, or float16 on CUDA; "
        "float32: exact numbers)",
        group="model",
    )
    trust_remote_code: bool = flag(False, "run modelling code that comes with the checkpoint", group="model")

    method: Literal["lora", "dora", "full", "distill"] = flag(
        "lora",
        "training method (full: all weights; distill: all weights, with the original as teacher)",
        group="method",
    )
    lora_r: int = flag(8, "rank of the adapter", group="method")
    lora_alpha: int = flag(16, "scale of the adapter's product, divided by --lora_r", group="method")
    lora_dropout: Share = flag(0.05, "dropout of the adapter", group="method")
    lora_target_modules: list[str] = flag(
        [],
        "linear layers to adapt, such as q_proj,v_proj (default: all but the output head and routers)",
        group="method",
    )
    merge: bool = flag(False, "also write the model with the adapter merged into it to OUTPUT/merged", group="method")
    objective: Literal["causal", "ul2", "d_ul2", "o_ul2"] = flag(
        "causal", "training objective (ul2, d_ul2 and o_ul2: for encoder-decoders only)", group="method"
    )

    teacher: str | None = flag(
        None,
        "model to distill from with any method; auto: the original (default of distill)",
        group="teacher",
    )
    distill_weight: Share = flag(
        0.5, "weight of the teacher's loss; the loss of the labels has the rest, 1 - X", group="teacher"
    )
    distill_temperature: float = flag(1.0, "temperature of the teacher's loss", group="teacher")
    distill_hidden: float = flag(
        0.0, "weight of the distance to the teacher's last hidden states (0: none)", group="teacher"
    )
    teacher_device: str = flag("auto", "device of the teacher (auto: the model's)", group="teacher")
    teacher_cache: str | None = flag(
        None, "folder to keep the teacher's outputs in; it then runs once, before training", group="teacher"
    )
    teacher_top: int = flag(
        64, "number of most probable tokens that --teacher_cache keeps per position", group="teacher"
    )

    data_path: list[str] = flag(
        [],
        "training data: hub data sets, general, python-docs, c4, or .json, .jsonl, .parquet, .csv or .txt files "
        f"(default: {DEFAULT_DATA}, and general,python-docs where the hub cannot be reached)",
        group="data",
    )
    extra_val_dataset: list[str] = flag([], "texts to validate on as well: wikitext2, ptb, or files", group="data")
    val_set_size: int | None = flag(
        None, "examples to validate on (default: 2000, at most 5%; 100 with --streaming)", group="data"
    )
    max_windows: int = flag(0, "use only the first N windows of each --extra_val_dataset (0: all)", group="data")
    cutoff_len: int | None = flag(
        None, "maximum tokens per example (default: 256, or the model's context if shorter)", group="data"
    )
    prompt_template_name: str = flag("alpaca", "prompt template: alpaca, question, or a .json file", group="data")
    no_instruction: bool = flag(False, "use no prompt template", group="data")
    bos: bool = flag(
        True,
        "begin every packed or validation window with the tokens that the tokenizer puts before a text, such as BOS "
        "(default: true; false: as in LLM-Pruner)",
        group="data",
    )
    train_on_inputs: bool = flag(False, "train on prompts as well as answers", group="data")
    add_eos_token: bool = flag(
        False, "add an end-of-text token when measuring a prompt's length, as LLM-Pruner does", group="data"
    )
    packing: bool = flag(
        False, "pack prompts with their answers into windows of --cutoff_len tokens, without padding", group="data"
    )
    self_data: bool = flag(
        False,
        "train on the original's own words: it answers the prompts and continues the texts of the data first",
        group="data",
    )
    self_data_rows: int = flag(0, "rows of each data set to rewrite, the first N (0: all)", group="data")
    streaming: bool = flag(False, "read the data as an iterable; needs --max_steps", group="data")
    cache_dataset: bool = flag(False, "cache tokenized data in datasets/cache", group="data")

    batch_size: int = flag(128, "examples per optimizer step, over all processes", group="training")
    micro_batch_size: int = flag(4, "examples per forward pass", group="training")
    num_epochs: float = flag(5, "passes over the data", group="training")
    max_steps: int = flag(0, "stop after N steps, whatever --num_epochs says (0: after --num_epochs)", group="training")
    learning_rate: float = flag(3e-4, "peak learning rate", group="training")
    warmup_steps: int | None = flag(
        None, "warm-up steps to the peak learning rate (default: 100, at most a tenth of all)", group="training"
    )
    lr_scheduler_type: str = flag("linear", "schedule: linear, cosine, constant_with_warmup, ...", group="training")
    weight_decay: float = flag(0.0, "weight decay", group="training")
    optim: str = flag(
        "adamw_torch", "optimizer, named as in transformers: adamw_torch, adamw_bnb_8bit, ...", group="training"
    )
    gradient_checkpointing: bool = flag(
        False, "recompute activations in the backward pass: less memory, slower", group="training"
    )
    group_by_length: bool = flag(False, "batch examples of similar length: faster, uneven loss curve", group="training")
    seed: int = flag(42, "random seed", group="training")

    output: str = flag(
        DEFAULT_OUTPUT,
        "folder of the adapter or model, its curves and its checkpoints",
        group="output",
        aliases=("output_dir",),
    )
    quiet: bool = flag(False, "show no progress and no log, only results, warnings and errors", group="output")
    eval_steps: int = flag(100, "steps between validations", group="output")
    save_steps: int = flag(200, "steps between checkpoints", group="output")
    save_total_limit: int = flag(3, "checkpoints to keep", group="output")
    logging_steps: int = flag(10, "steps between log entries", group="output")
    resume_from_checkpoint: str | None = flag(
        None, "checkpoint folder to continue from; auto: the newest in --output, if any", group="output"
    )
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = flag(
        "none", "service to log to as well", group="output"
    )
    wandb_project: str | None = flag(None, "project of Weights & Biases; implies --report_to wandb", group="output")

    @property
    def distills(self) -> bool:
        """True if a teacher's outputs are learnt."""
        return self.teacher is not None or self.method == "distill"

    @property
    def logger(self) -> str:
        """Value of ``--report_to``, which ``--wandb_project`` implies."""
        return "wandb" if self.wandb_project else self.report_to

    def check(self) -> None:
        """Refuse what cannot work, before anything is loaded.

        Raises:
            PrunerError: flags exclude or need each other, a value is out of range, or a package is not installed.
        """
        if not self.model:
            raise PrunerError("--model is missing: give the folder of the model to train")
        check_combinations(self, EXCLUSIVE, REQUIRES)
        if self.merge and self.method not in ADAPTER_METHODS:
            raise PrunerError(
                f"--merge is not valid with --method {self.method}: it merges the adapter of lora or dora"
            )
        self._check_ranges()
        self._check_teacher()
        if self.wandb_project and self.report_to not in ("none", "wandb"):
            raise PrunerError(f"--wandb_project and --report_to {self.report_to} exclude each other: give one")
        self._check_packages()

    def _check_teacher(self) -> None:
        """Refuse flags of a teacher where no model teaches."""
        given = [name for name in OF_A_TEACHER if getattr(self, name) != getattr(type(self), name)]
        if given and not self.distills:
            raise PrunerError(f"--{given[0]} needs --teacher or --method distill")
        if self.teacher_device != "auto" and not (self.distills or self.self_data):
            raise PrunerError("--teacher_device needs --teacher, --method distill or --self_data")

    def _check_ranges(self) -> None:
        check_at_least(self, 1, *COUNTS)
        check_at_least(self, 0, *COUNTS_FROM_0, "weight_decay", "distill_hidden")
        check_at_least(self, 2, "cutoff_len")
        for small, large in (("micro_batch_size", "batch_size"), ("eval_steps", "save_steps")):
            if getattr(self, large) % getattr(self, small):
                raise PrunerError(
                    f"--{large} {getattr(self, large)} is not valid: give a multiple of --{small} "
                    f"{getattr(self, small)}"
                )
        for name in ("learning_rate", "distill_temperature", *(() if self.max_steps else ("num_epochs",))):
            if not 0 < getattr(self, name) < float("inf"):
                raise PrunerError(f"--{name} {getattr(self, name)} is out of range: give a number above 0")
        if not 0 <= self.lora_dropout < 1:
            raise PrunerError(f"--lora_dropout {self.lora_dropout} is out of range: give at least 0 and below 1")
        if not 0 <= self.distill_weight <= 1:
            raise PrunerError(f"--distill_weight {self.distill_weight} is out of range: give 0 to 1")
        if not 0 <= self.seed < 2**32:
            raise PrunerError(f"--seed {self.seed} is out of range: give 0 to 4294967295")

    def _check_packages(self) -> None:
        if self.method in ADAPTER_METHODS:
            require("peft", "recover", f"--method {self.method} needs")
        packages = [self.logger] if self.logger != "none" else []
        of_bitsandbytes = ("bnb", "8bit", "32bit", "ademamix")
        if any(part in self.optim for part in of_bitsandbytes) and not self.optim.startswith("adamw_torch"):
            packages.append("bitsandbytes")
        for package in packages:
            if not is_installed(package):
                raise PrunerError(f"{package} is not installed: pip install {package}")
