"""llm-pruner: structural pruning of any Hugging Face transformer.

Importing the package patches transformers once it is imported (:mod:`llm_pruner.models.per_layer`): model classes then
build layers of different widths from per-layer configs. Heavy modules are imported when a name is first used.

    import llm_pruner as lp
    from llm_pruner.data import calibration

    model, tokenizer = lp.load("smollm2-135m")
    graph = lp.trace(model)                           # the prunable units
    ids = calibration("python-docs", tokenizer)       # token ids [samples, tokens]
    scores = lp.score(model, graph, ids)              # the importance of each index
    plan = lp.select(graph, scores, ratio=0.25)       # the indices that stay
    pruned = lp.apply(model, plan)                    # a smaller model of the same class
    lp.save(pruned, tokenizer, "pruned", plan=plan)   # a checkpoint

    run = lp.prune("smollm2-135m", target_params=0.8, output="smaller")  # all steps in one call
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import PrunerError
from .models.install import install_when_imported
from .version import __version__

if TYPE_CHECKING:
    from .checkpoint.load import load
    from .checkpoint.save import save
    from .graph.units import CouplingGraph, Unit, trace
    from .importance.criteria import register_criterion
    from .importance.score import score
    from .importance.scores import Scores
    from .pruning.run import PruneRun, prune
    from .refit.allocation import search
    from .refit.compensate import compensate
    from .refit.methods import refit
    from .selection.plan import PruningPlan
    from .selection.select import select
    from .surgery.apply import apply
    from .surgery.equivalence import verify

__all__ = [
    "CouplingGraph",
    "PruneRun",
    "PrunerError",
    "PruningPlan",
    "Scores",
    "Unit",
    "__version__",
    "apply",
    "compensate",
    "load",
    "prune",
    "refit",
    "register_criterion",
    "save",
    "score",
    "search",
    "select",
    "trace",
    "verify",
]

_MODULES = {
    "load": "checkpoint.load",
    "save": "checkpoint.save",
    "CouplingGraph": "graph.units",
    "Unit": "graph.units",
    "trace": "graph.units",
    "register_criterion": "importance.criteria",
    "score": "importance.score",
    "Scores": "importance.scores",
    "PruneRun": "pruning.run",
    "prune": "pruning.run",
    "search": "refit.allocation",
    "compensate": "refit.compensate",
    "PruningPlan": "selection.plan",
    "select": "selection.select",
    "apply": "surgery.apply",
    "verify": "surgery.equivalence",
}


def __getattr__(name: str) -> Any:
    if name == "refit":  # a room that can be called
        return import_module(f"{__name__}.refit")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


install_when_imported()
