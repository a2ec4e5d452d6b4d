"""The table of commands: function, flags, and chaining in recipes.

Functions and flags are named by strings and imported when a command is asked for, so that ``llm-pruner --help`` loads
neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module
from typing import Any

from .choices import ADAPTER_METHODS
from .inputs import InputCheck


@dataclass(frozen=True, kw_only=True)
class Chaining:
    """Description of a command as a stage of a recipe.

    Attributes:
        reads: flag that names the model to read, None for a command that reads none.
        reads_adapter: True if the command can read the folder of an adapter.
        writes: flags that the recipe sets, with ``{folder}`` for the stage's folder.
        leaves: subfolder of the stage's folder with the resulting checkpoint, by the stage's arguments; None for a
            command that leaves no checkpoint.
        leaves_adapter: True if that checkpoint is an adapter, not a full model.
        defaults: defaults of a stage that differ from the command's, by the arguments given.
    """

    reads: str | None = "model"
    reads_adapter: bool = True
    writes: Mapping[str, Any]
    leaves: Callable[[Any], str] | None = lambda arguments: ""
    leaves_adapter: Callable[[Any], bool] = lambda arguments: False
    defaults: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda given: {}


@dataclass(frozen=True)
class Command:
    """One command of ``llm-pruner``, or one script.

    Attributes:
        summary: one line for ``--help``.
        function: ``module:function``, called with the arguments.
        arguments: ``module:class`` of its flags.
        positionals: flags that leading words without dashes fill; further words go to the last.
        chaining: how a recipe runs the command, None for a command that cannot be a stage.
        check: ``module:function`` that refuses arguments which cannot work, before anything is loaded; None for the
            arguments' own ``check``.
        inputs: ``module:function`` that refuses models, texts, files and folders which the arguments name and the
            command cannot use, by arguments and :class:`~llm_pruner.inputs.InputCheck`.
    """

    summary: str
    function: str
    arguments: str
    positionals: tuple[str, ...] = ()
    chaining: Chaining | None = None
    check: str | None = None
    inputs: str | None = None

    @cached_property
    def run(self) -> Callable[[Any], Any]:
        return _import(self.function)

    @cached_property
    def arguments_class(self) -> type:
        return _import(self.arguments)

    def check_arguments(self, arguments: Any) -> None:
        """Refuse arguments that cannot work, before anything is loaded.

        Raises:
            PrunerError: a value is not valid; the message names the flag.
        """
        if self.check is None:
            arguments.check()
        else:
            _import(self.check)(arguments)

    def check_inputs(self, arguments: Any, check: InputCheck) -> None:
        """Refuse what the arguments name and the command cannot use, before any work; nothing is written.

        Raises:
            PrunerError: a model, text, file or folder is missing or not usable; the message names the flag.
        """
        if self.inputs is not None:
            _import(self.inputs)(arguments, check)


def _import(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(import_module(f"llm_pruner.{module}"), attribute)


def _recovery_defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    return {"merge": given.get("method", "lora") in ADAPTER_METHODS, "resume_from_checkpoint": "auto"}


_TO_FOLDER = {"output": "{folder}"}

COMMANDS: dict[str, Command] = {
    "prune": Command(
        "Prune a model and measure it before and after.",
        "pruning.run:run_prune",
        "pruning.arguments:PruneArguments",
        ("model", "output"),
        Chaining(
            writes=_TO_FOLDER | {"save_model": True},
            reads_adapter=False,
            defaults=lambda given: {"eval_datasets": []},
        ),
        check="pruning.settings:resolve_settings",
        inputs="pruning.checking:check_prune_inputs",
    ),
    "recover": Command(
        "Train a pruned model to regain its quality.",
        "recovery.run:recover",
        "recovery.arguments:RecoverArguments",
        ("model", "output"),
        Chaining(
            writes=_TO_FOLDER,
            reads_adapter=False,
            leaves=lambda arguments: "merged" if arguments.merge else "",
            leaves_adapter=lambda arguments: arguments.method in ADAPTER_METHODS and not arguments.merge,
            defaults=_recovery_defaults,
        ),
        check="recovery.settings:resolve_settings",
        inputs="recovery.checking:check_recovery_inputs",
    ),
    "evaluate": Command(
        "Compare models: perplexity, tasks, size and speed.",
        "evaluation.run:run_evaluate",
        "evaluation.arguments:EvaluateArguments",
        ("model",),
        Chaining(writes=_TO_FOLDER, leaves=None),
        inputs="evaluation.checking:check_evaluation_inputs",
    ),
    "vocab": Command(
        "Remove unneeded tokens from a model and its tokenizer.",
        "vocabulary.run:prune_vocabulary",
        "vocabulary.arguments:VocabArguments",
        ("model", "output"),
        Chaining(writes=_TO_FOLDER),
        inputs="vocabulary.checking:check_vocabulary_inputs",
    ),
    "apply": Command(
        "Apply a plan to a checkpoint file by file, without loading the model.",
        "pruning.apply_plan:apply_plan",
        "checkpoint.arguments:ApplyArguments",
        ("plan", "model", "output"),
        Chaining(writes=_TO_FOLDER, reads_adapter=False),
        inputs="pruning.checking:check_apply_inputs",
    ),
    "to-uniform": Command(
        "Pad layers of different widths with zeros, for a stock checkpoint.",
        "checkpoint.run:write_uniform",
        "checkpoint.arguments:UniformArguments",
        ("model", "output"),
        Chaining(writes=_TO_FOLDER, reads_adapter=False),
        inputs="checkpoint.checking:check_uniform_inputs",
    ),
    "export": Command(
        "Write a model for another engine: a plain checkpoint, GGUF, Nemotron-NAS.",
        "serving.export:run_export",
        "serving.arguments:ExportArguments",
        ("model", "output"),
        inputs="serving.export:check_export_inputs",
    ),
    "run": Command(
        "Run a recipe stage by stage, skipping finished stages.",
        "recipes.run:run_recipe",
        "recipes.arguments:RunArguments",
        ("recipe",),
    ),
    "report": Command(
        "Write one page about runs: tables, figures, samples, provenance.",
        "report.page:write_report",
        "report.arguments:ReportArguments",
        ("runs",),
        Chaining(reads=None, writes={"output": "{folder}/report.html"}, leaves=None),
        inputs="report.checking:check_report_inputs",
    ),
    "chat": Command(
        "Serve a page that sends one prompt to up to three models.",
        "tools.chat:serve_chat",
        "tools.arguments:ChatArguments",
        ("model",),
        inputs="tools.checking:check_chat_inputs",
    ),
    "inspect": Command(
        "Print the units of a model, or what a plan removes.",
        "tools.inspection:run_inspect",
        "tools.arguments:InspectArguments",
        ("model",),
    ),
    "demo": Command(
        "Prune and recover the embedded model, and compare both results with the original.",
        "recipes.demo:run_demo",
        "tools.arguments:DemoArguments",
        inputs="tools.checking:check_demo_inputs",
    ),
}
# The scripts at the root and in evaluate/: the same functions with LLM-Pruner's flags and defaults.
SCRIPTS: dict[str, Command] = {
    "hf_prune.py": replace(COMMANDS["prune"], arguments="pruning.arguments:HfPruneArguments"),
    "post_training.py": COMMANDS["recover"],
    "generate.py": Command(
        "Serve a page to try a model, chosen as LLM-Pruner's generate.py does.",
        "tools.chat:serve_chat",
        "tools.arguments:GenerateArguments",
        ("model",),
        inputs="tools.checking:check_chat_inputs",
    ),
    "evaluate/cost.py": Command(
        "Measure size, compute, memory and speed.",
        "evaluation.run:run_evaluate",
        "evaluation.arguments:CostArguments",
        ("model",),
        inputs="evaluation.checking:check_evaluation_inputs",
    ),
    "evaluate/perplexity.py": Command(
        "Measure perplexity.",
        "evaluation.run:run_perplexity",
        "evaluation.arguments:PerplexityArguments",
        ("model",),
        inputs="evaluation.checking:check_perplexity_inputs",
    ),
    "evaluate/zero_shot.py": Command(
        "Measure accuracy on tasks of lm-eval.",
        "evaluation.run:run_evaluate",
        "evaluation.arguments:ZeroShotArguments",
        ("model",),
        inputs="evaluation.checking:check_evaluation_inputs",
    ),
}
