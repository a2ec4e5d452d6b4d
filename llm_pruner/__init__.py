"""llm-pruner: structural pruning of any Hugging Face transformer.

model, tokenizer = lp.load("smollm2-135m")
graph = lp.trace(model)                               # which axes are coupled
scores = lp.score(model, graph, calibration)          # what each index is worth
plan = lp.select(graph, scores, ratio=0.25)           # what stays, as data
pruned = lp.apply(model, plan)                        # a smaller model of the same class
lp.save(pruned, tokenizer, "pruned", plan=plan)       # an ordinary checkpoint
"""

from .checkpoint import load, save
from .errors import PrunerError
from .graph import CouplingGraph, Unit, trace
from .importance import Scores, score
from .selection import PruningPlan, select
from .surgery import apply, compensate, install, verify
from .version import __version__

__all__ = [
    "CouplingGraph",
    "PrunerError",
    "PruningPlan",
    "Scores",
    "Unit",
    "__version__",
    "apply",
    "compensate",
    "load",
    "save",
    "score",
    "select",
    "trace",
    "verify",
]

install()  # so that AutoModel.from_pretrained reads checkpoints whose layers differ
