"""Score and refit a tiny model, and write the results: run alone, or by torchrun on several processes."""

import sys

import torch
from safetensors.torch import save_file

import llm_pruner as lp
from helpers.models import build, pruned_by, tokens
from llm_pruner.models.processes import joined, rank
from llm_pruner.refit.budget import Budget
from llm_pruner.refit.lora import lora
from llm_pruner.refit.reconstruct import reconstruct

SCORES = {variant: {"taylor": variant} for variant in ("param_first", "param_second", "param_mix")}
SCORES |= {"flap": {"criterion": "flap"}}


def results(family):
    """Return scores of every unit by method, and the parameters after each refit."""
    model, ids = build(family), tokens(64, 64)
    graph, found = lp.trace(model), {}
    for name, options in SCORES.items():
        scores = lp.score(model, graph, ids, kinds=("neurons",), **options)
        found |= {f"{name}.{unit}": values for unit, values in scores.values.items()}
    _, pruned = pruned_by(model, kinds=("neurons",))
    refits = {
        "ridge": lambda: lp.compensate(model, pruned, ids),
        "blocks": lambda: reconstruct(model, pruned, ids, Budget(tokens=1024)),
        "lora": lambda: lora(model, pruned, ids, Budget(tokens=2048), seed=0),
    }
    for name, refit in refits.items():
        refit()
        found |= {f"{name}.{parameter}": p.detach().clone() for parameter, p in pruned.named_parameters()}
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    with joined("cpu"):
        tensors = results(sys.argv[1])
        if rank() == 0:
            save_file(tensors, sys.argv[2])
