"""Flags of ``llm-pruner evaluate`` and of the scripts in ``evaluate/``."""

from __future__ import annotations

from dataclasses import dataclass

from ..choices import DEFAULT_MODEL, GENERAL, Dtype, EngineName
from ..errors import PrunerError
from ..flags import Arguments, check_at_least, flag
from ..optional import require, require_engine

SETS = (
    "paper (the seven of LLM-Pruner's table 1), openllm (MMLU, ARC-challenge, HellaSwag, WinoGrande, TruthfulQA, "
    "GSM8K), reasoning (GSM8K, MATH-500), code (HumanEval, MBPP)"
)
TEXTS = "general, wikitext2, ptb, c4, python-docs, or a .txt, .json or .jsonl file"


@dataclass(kw_only=True)
class MeasuringArguments(Arguments):
    """Flags of every command that measures a model on texts."""

    seq_len: int = flag(128, "tokens per window", group="texts")
    stride: int = flag(0, "tokens between the starts of two windows (0: windows do not overlap)", group="texts")
    bos: bool = flag(
        True,
        "begin every window with the tokens that the tokenizer puts before a text, such as BOS (default: true; "
        "false: as in LLM-Pruner)",
        group="texts",
    )
    max_windows: int = flag(0, "use only the first N windows of a text (0: all)", group="texts")
    device: str = flag("auto", "device: auto, cpu, cuda, cuda:1, mps, ...", group="model")
    dtype: Dtype = flag("auto", "dtype of the weights", group="model")
    verify: bool = flag(False, "check the files of pruned models against the hashes in their plans", group="model")
    trust_remote_code: bool = flag(False, "run modelling code that comes with the checkpoint", group="model")


@dataclass(kw_only=True)
class EvaluateArguments(MeasuringArguments):
    """Flags of ``llm-pruner evaluate``."""

    model: list[str] = flag(
        [],
        "models to measure, each compared with the first: aliases, hub ids, folders (adapters too) or .gguf files",
        group="model",
        aliases=("models",),
    )
    task: str | None = flag(
        None, "load the class of this task, such as text-generation, instead of the declared class", group="model"
    )
    datasets: list[str] = flag([GENERAL], f"texts for perplexity: {TEXTS} ('' for none)", group="texts")
    batch_size: int = flag(0, "windows or requests per forward pass (0: as many as fit)", group="texts")
    tasks: list[str] = flag([], f"tasks of lm-eval, and sets of them: {SETS}", group="tasks")
    labelled: list[str] = flag(
        [],
        "labelled .jsonl files, or folders of images or sounds: accuracy of classifiers, rank correlation of rewards "
        "and pairs of embeddings, word error rate of speech",
        group="tasks",
    )
    include_path: str | None = flag(None, "folder with your own lm-eval task files", group="tasks")
    limit: int | None = flag(None, "use only the first N questions of each task, or labelled rows", group="tasks")
    num_fewshot: int | None = flag(
        None, "worked examples before each question (default: the set's or the task's own number)", group="tasks"
    )
    apply_chat_template: bool = flag(
        False, "put questions into the chat template of the tokenizer, worked examples as its turns", group="tasks"
    )
    system_instruction: str | None = flag(
        None, "text before each question; with a chat template, its system message", group="tasks"
    )
    gen_kwargs: str | None = flag(
        None, "settings of tasks that generate, as in max_gen_toks=256,temperature=0", group="tasks"
    )
    confirm_run_unsafe_code: bool = flag(
        False, "run the code that models write in tasks such as humaneval and mbpp, on this machine", group="tasks"
    )
    tokens: int = flag(128, "tokens per sequence for speed, MACs and cache (0: measure no speed)", group="cost")
    batch: int = flag(1, "sequences per batch for speed, MACs and cache", group="cost")
    new_tokens: int = flag(32, "tokens to generate for decode speed and for each sample", group="cost")
    engine: EngineName | None = flag(
        None,
        "also time the models in this engine (vllm then runs --tasks too), with 1, 8 and 32 sequences at once",
        group="cost",
    )
    samples: bool = flag(
        False,
        "let every model continue a few prompts, and measure the length and repetition of the texts",
        group="output",
    )
    output: str | None = flag(
        None, "folder for table.csv, table.md, table.tex, evaluation.json and lm_eval/", group="output"
    )
    quiet: bool = flag(False, "show no progress and no log, only results, warnings and errors", group="output")

    def check(self) -> None:
        """Refuse arguments that cannot work.

        Raises:
            PrunerError: no model is named, a number is out of range, or lm-eval or the engine is named and not
                installed.
        """
        if not self.model:
            raise PrunerError("name at least one model: llm-pruner evaluate MODEL [MODEL ...]")
        check_at_least(self, 0, "batch_size", "max_windows", "stride", "tokens", "num_fewshot")
        check_at_least(self, 1, "batch", "new_tokens", "limit")
        check_at_least(self, 2, "seq_len")
        for name in (
            "num_fewshot",
            "apply_chat_template",
            "system_instruction",
            "gen_kwargs",
            "confirm_run_unsafe_code",
        ):
            if getattr(self, name) and not self.tasks:
                raise PrunerError(f"--{name} changes tasks only: name some with --tasks")
        if self.limit is not None and not (self.tasks or self.labelled):
            raise PrunerError("--limit shortens tasks and labelled examples: name some with --tasks or --labelled")
        if self.tasks:
            require("lm_eval", "eval", "tasks need")
        if self.engine is not None:
            require_engine(self.engine)


@dataclass(kw_only=True)
class ZeroShotArguments(EvaluateArguments):
    """Flags of ``evaluate/zero_shot.py``."""

    datasets: list[str] = flag([], f"texts to measure perplexity on as well: {TEXTS}", group="texts")
    tasks: list[str] = flag(["paper"], f"tasks of lm-eval, and sets of them: {SETS}", group="tasks")
    tokens: int = flag(0, "tokens per sequence for speed, MACs and cache (0: measure no speed)", group="cost")


@dataclass(kw_only=True)
class CostArguments(EvaluateArguments):
    """Flags of ``evaluate/cost.py``."""

    datasets: list[str] = flag([], f"texts to measure perplexity on as well: {TEXTS}", group="texts")


@dataclass(kw_only=True)
class PerplexityArguments(MeasuringArguments):
    """Flags of ``evaluate/perplexity.py``."""

    model: str = flag(
        DEFAULT_MODEL,
        "alias of the embedded model, hub id, folder, or .gguf file",
        group="model",
        aliases=("base_model",),
    )
    dataset: str = flag(GENERAL, f"text to measure on: {TEXTS}", group="texts")
    batch_size: int = flag(0, "windows per forward pass (0: as many as fit)", group="texts")
    output: str | None = flag(None, "JSON file for the result", group="output")
    quiet: bool = flag(False, "show no progress and no log, only results, warnings and errors", group="output")

    def check(self) -> None:
        """Refuse numbers out of range.

        Raises:
            PrunerError: a number is out of range.
        """
        check_at_least(self, 0, "batch_size", "max_windows", "stride")
        check_at_least(self, 2, "seq_len")
