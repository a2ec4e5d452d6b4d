"""The arguments of the commands, as dataclasses; ``HfArgumentParser`` turns them into flags.

Those of pruning and of recovery are beside what they steer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .checkpoint import DEFAULT_MODEL, DTYPES, base_of, usable
from .data import EMBEDDED_TEXT
from .errors import PrunerError
from .files import same


def flag(default: Any, help: str) -> Any:
    """A dataclass field that knows its ``--help`` text."""
    return field(default=default, metadata={"help": help})


def one_of(args: Any, **choices: Iterable[str]) -> None:
    """Raises: PrunerError: a flag has none of the values that it may have."""
    for name, allowed in choices.items():
        if getattr(args, name) not in allowed:
            raise PrunerError(f"unknown --{name} {getattr(args, name)!r}; choose from {', '.join(allowed)}")


def listed(text: str | None) -> list[str]:
    """The entries of a flag that takes several, by comma."""
    return [entry.strip() for entry in (text or "").split(",") if entry.strip()]


def at_least(args: Any, least: int, *names: str) -> None:
    """Raises: PrunerError: a flag is below the least value that it may have; one that is not given is not."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < least:
            raise PrunerError(f"--{name} {value} is out of range: give {least} or more")


def device_of(flag_name: str, value: str) -> str:
    """The device that a flag means. Raises: PrunerError: there is none such here."""
    if value == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    usable(value, f"--{flag_name}")
    return value


@dataclass
class MeasuringArguments:
    """What is given whenever a model is measured on texts."""

    seq_len: int = flag(128, "tokens in a window")
    stride: int = flag(0, "tokens from window to window (0: they lie side by side)")
    max_windows: int = flag(0, "use only the first N windows of a text (0: all)")
    device: str = flag("auto", "device: auto, cpu, cuda, cuda:1, ...")
    dtype: str = flag("auto", "of the weights: " + ", ".join(DTYPES))
    verify: bool = flag(False, "compare pruned models with the hashes in their plans before they are read")
    trust_remote_code: bool = flag(False, "run modelling code that comes with the checkpoint")


@dataclass
class EvaluateArguments(MeasuringArguments):
    """Measure models side by side: perplexity, tasks, size and speed."""

    models: list[str] = field(
        default_factory=list,
        metadata={"help": "aliases, hub ids, folders (of adapters too) or .gguf files; the first is compared to"},
    )
    datasets: str = flag(
        EMBEDDED_TEXT, "texts for perplexity, by comma: wikitext2, ptb, c4, python-docs, files ('': none)"
    )
    batch_size: int = flag(0, "windows or requests in a forward pass (0: as many as fit)")
    tasks: str = flag("", "lm-eval's tasks, by comma; paper: the seven of LLM-Pruner's table 1")
    include_path: str | None = flag(None, "folder with lm-eval task files of your own")
    limit: int | None = flag(None, "use only the first N documents of each task")
    num_fewshot: int | None = flag(None, "worked examples before each question (default: the task's)")
    tokens: int = flag(128, "length at which speed, compute and cache are meant; 0: measure no speed")
    batch: int = flag(1, "sequences at which they are meant")
    new_tokens: int = flag(32, "tokens to write when timing, and for each of --samples")
    samples: bool = flag(False, "have each model go on with a few prompts")
    output: str | None = flag(None, "write table.csv, table.md, table.tex, evaluation.json and lm_eval/ to this folder")

    def check(self) -> None:
        """Raises: PrunerError: with the one line that the user reads."""
        if not self.models:
            raise PrunerError("name at least one model: llm-pruner evaluate MODEL [MODEL ...]")
        at_least(self, 0, "batch_size", "max_windows", "stride", "tokens", "num_fewshot")
        at_least(self, 1, "batch", "new_tokens", "limit")
        at_least(self, 2, "seq_len")
        one_of(self, dtype=DTYPES)
        self.device = device_of("device", self.device)


@dataclass
class ZeroShotArguments(EvaluateArguments):
    """Measure accuracy on lm-eval's tasks."""

    datasets: str = flag("", "texts for perplexity as well, by comma")
    tasks: str = flag("paper", "lm-eval's tasks, by comma; paper: the seven of LLM-Pruner's table 1")
    tokens: int = flag(0, "length at which speed, compute and cache are meant; 0: measure no speed")


@dataclass
class CostArguments(EvaluateArguments):
    """Measure size, compute, memory and speed."""

    datasets: str = flag("", "texts for perplexity as well, by comma")


@dataclass
class ReportArguments:
    """Make one page of runs: tables, figures, samples, and what made them."""

    runs: list[str] = field(
        default_factory=list, metadata={"help": "folders of runs of prune and recover, and of evaluate --output"}
    )
    output: str = flag("report.html", "the page to write: one file that needs no network")
    figures: str | None = flag(None, "write every figure to this folder too, as SVG and PNG")
    title: str = flag("Pruning report", "title of the page")

    def check(self) -> None:
        """Raises: PrunerError: with the one line that the user reads."""
        if not self.runs:
            raise PrunerError("name at least one run: llm-pruner report FOLDER [FOLDER ...]")


@dataclass
class RunArguments:
    """Run a recipe: stages one after the other, what is finished not again."""

    recipe: str = flag("", "the recipe, a YAML file")
    dry_run: bool = flag(False, "say what every stage leaves, without weights and in seconds")
    model: str | None = flag(None, "another model than the recipe's")
    output: str | None = flag(None, "another folder than the recipe's")
    executor: str | None = flag(None, "where the runs of a sweep take place: local, slurm, or submitit")
    status: bool = flag(False, "show how far a sweep is")
    yes: bool = flag(False, "run a sweep however many runs it makes")
    worker: bool = flag(False, "do what nobody is at and make no table: what executors start")

    def check(self) -> None:
        """Raises: PrunerError: with the one line that the user reads."""
        if not self.recipe:
            raise PrunerError("name a recipe: llm-pruner run RECIPE.yaml")


@dataclass
class ChatArguments:
    """Serve a page where one prompt goes to up to three models, side by side."""

    models: list[str] = field(
        default_factory=list, metadata={"help": "aliases, hub ids, folders (of adapters too) or .gguf files"}
    )
    device: str = flag("auto", "device: auto, cpu, cuda, cuda:1, ...")
    dtype: str = flag("auto", "of the weights: " + ", ".join(DTYPES))
    trust_remote_code: bool = flag(False, "run modelling code that comes with the checkpoint")
    host: str = flag("127.0.0.1", "address to serve on; 0.0.0.0 lets everybody in who reaches this machine")
    port: int = flag(7860, "port to serve on")
    share_gradio: bool = flag(False, "open a public address through gradio's servers too")

    def chosen(self) -> list[str]:
        """The models to load.

        Raises:
            PrunerError: none, or more than fit beside each other.
        """
        if not 1 <= len(self.models) <= 3 or len(set(self.models)) < len(self.models):
            raise PrunerError("name one to three different models: llm-pruner chat MODEL [MODEL [MODEL]]")
        if not 0 < self.port < 65536:
            raise PrunerError(f"--port {self.port} is out of range: give 1 to 65535")
        return self.models


MODEL_TYPES = ("pretrain", "pruneLLM", "tune_prune_LLM")


@dataclass
class GenerateArguments(ChatArguments):
    """Serve a page to try a model, chosen as LLM-Pruner's generate.py does."""

    base_model: str = flag(DEFAULT_MODEL, "the model of --model_type pretrain")
    model_type: str = flag("pretrain", "which of the models to serve: " + ", ".join(MODEL_TYPES))
    ckpt: str | None = flag(
        None, "folder of the pruned model, for --model_type pruneLLM; for tune_prune_LLM the one that the adapter names"
    )
    lora_ckpt: str | None = flag(None, "folder of the adapter, for --model_type tune_prune_LLM")

    def chosen(self) -> list[str]:
        one_of(self, model_type=MODEL_TYPES)
        flags = {"pretrain": "base_model", "pruneLLM": "ckpt", "tune_prune_LLM": "lora_ckpt"}
        if not self.models:
            name = getattr(self, flags[self.model_type])
            if name is None:
                raise PrunerError(f"--model_type {self.model_type} needs --{flags[self.model_type]}")
            self.models = [folder_of(name)]
            if self.model_type == "tune_prune_LLM" and self.ckpt is not None:
                told = base_of(self.models[0])
                if not same(told, folder_of(self.ckpt)):
                    raise PrunerError(f"the adapter {self.models[0]} was trained on {told}, not on --ckpt {self.ckpt}")
        return super().chosen()


def folder_of(name: str) -> str:
    """The folder of a checkpoint that LLM-Pruner's documentation names by its pickle, which ours has not."""
    path = Path(name)
    if path.name == "pytorch_model.bin" and not path.exists() and (path.parent / "config.json").is_file():
        return str(path.parent)
    return name


@dataclass
class PerplexityArguments(MeasuringArguments):
    """Measure perplexity."""

    model: str = flag(DEFAULT_MODEL, "alias of the embedded model, hub id, folder, or .gguf file")
    dataset: str = flag(EMBEDDED_TEXT, "wikitext2, ptb, c4, python-docs, or a .txt, .json or .jsonl file")
    batch_size: int = flag(0, "windows in a batch (0: as many as fit)")
    output: str | None = flag(None, "write the result to this JSON file")


@dataclass
class InspectArguments:
    """Print the units of a model, what is frozen and why; or a plan, what it removes and why."""

    model: str = flag(DEFAULT_MODEL, "alias, hub id, folder, .gguf file, config.json (no weights are read), or a plan")
    layer: int | None = flag(0, "show units of this layer (and those of the whole model); -1 for all")
    verify: bool = flag(False, "load the weights and put every unit to the permutation test")
    json: bool = flag(False, "print JSON")
    trust_remote_code: bool = flag(False, "run modelling code that comes with the checkpoint")


@dataclass
class ApplyArguments:
    """Carry out a plan on a checkpoint, file by file, without loading it."""

    plan: str = flag("", "the plan, a JSON file")
    checkpoint: str = flag("", "folder of the model that the plan is for, in safetensors")
    out: str = flag("", "folder to write")
    verify: bool = flag(False, "refuse a plan that was changed after it was written, and check what was written")
    standalone: bool = flag(False, "write a modelling file too, so that layers that differ load without llm_pruner")
    trust_remote_code: bool = flag(False, "run modelling code that comes with the checkpoint")

    def check(self) -> None:
        """Raises: PrunerError: with the one line that the user reads."""
        if not (self.plan and self.checkpoint and self.out):
            raise PrunerError("give a plan, a checkpoint and a folder to write: llm-pruner apply PLAN CHECKPOINT OUT")


@dataclass
class VocabArguments:
    """Cut tokens that are not needed from a model and its tokenizer."""

    model: str = flag(DEFAULT_MODEL, "alias of the embedded model, hub id, folder, or .gguf file")
    output_dir: str = flag("vocab_log", "folder to write")
    corpus: str | None = flag(None, "texts to count tokens in, by comma: hub data sets, python-docs, or files")
    max_documents: int = flag(200_000, "of a corpus on the hub, count so many documents at most (0: all)")
    keep: str | None = flag(None, "tokens to keep: 15000, 0.5 (a share), or coverage=0.9999 (of what was counted)")
    min_count: int = flag(0, "keep only tokens that occur at least so often")
    to_tokenizer: str | None = flag(None, "keep the tokens of this tokenizer, all of which this one must have")
    languages: str | None = flag(None, "keep tokens in the scripts of these languages, by comma: en,zh")
    scripts: str | None = flag(None, "keep tokens in these scripts, by comma: Han,Latin")
    keep_tokens: str | None = flag(None, "file of tokens to keep in any case, one a line")
    save_counts: str | None = flag(None, "file to keep counts in; what it has is not counted again")
    eval_dataset: str = flag(EMBEDDED_TEXT, "text to compare both models on")
    max_windows: int = flag(0, "use only what the first N windows of the original cover for perplexity (0: all)")
    device: str = flag("auto", "device: auto, cpu, cuda, cuda:1, ...")
    dtype: str = flag("auto", "of the weights: " + ", ".join(DTYPES))
    trust_remote_code: bool = flag(False, "run modelling code that comes with the checkpoint")

    def check(self) -> None:
        """Raises: PrunerError: with the one line that the user reads."""
        at_least(self, 0, "min_count", "max_windows", "max_documents")
        one_of(self, dtype=DTYPES)
        if not (self.keep or self.min_count or self.to_tokenizer or self.languages or self.scripts):
            raise PrunerError("say what is to stay: --keep, --min_count, --to_tokenizer, --languages or --scripts")
        if (self.keep or self.min_count) and not self.corpus:
            raise PrunerError("--keep and --min_count go by how often tokens occur: give --corpus")

    def sources(self) -> list[str]:
        return listed(self.corpus)


@dataclass
class UniformArguments:
    """Pad a checkpoint whose layers differ with zeros, so that it is a plain one."""

    checkpoint: str = flag("", "folder of a pruned model whose layers have different widths")
    out: str = flag("", "folder to write: the same logits, every layer as wide as the widest")
    trust_remote_code: bool = flag(False, "run modelling code that comes with the checkpoint")

    def check(self) -> None:
        """Raises: PrunerError: with the one line that the user reads."""
        if not (self.checkpoint and self.out):
            raise PrunerError("give a checkpoint and a folder to write: llm-pruner to-uniform CHECKPOINT OUT")


@dataclass
class DemoArguments:
    """Prune the embedded model and show what it does to it."""

    output_root: str = flag("prune_log", "folder of the run")
    pruning_ratio: float = flag(0.25, "share of the MLP neurons and heads to remove")
