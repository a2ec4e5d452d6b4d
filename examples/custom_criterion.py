"""A criterion of your own: score neurons by how far their weights lie from those of the other neurons.

python examples/custom_criterion.py

The same function from the command line, in this folder:

llm-pruner prune smollm2-135m smaller --pruner_type custom_criterion:distance --kinds neurons --pruning_ratio 0.1
"""

import torch

import llm_pruner as lp
from llm_pruner.importance.request import Request


def distance(request: Request) -> dict[str, torch.Tensor]:
    """Return scores per unit, ``{unit.name: Tensor [unit.size]}``: the distance of each index from the mean index."""
    weights = dict(request.weights)
    scores = {}
    for unit in request.units:
        slices = []
        for name, dim in unit.dims:  # gate_proj and up_proj: rows; down_proj: columns
            channels = weights[name].detach().float().movedim(dim, 0)  # [size of dim, other dims]
            slices.append(channels[unit.positions(name, dim)].reshape(unit.size, -1))  # [unit.size, features]
        features = torch.cat(slices, dim=1)
        scores[unit.name] = (features - features.mean(0)).norm(dim=1)
    return scores


if __name__ == "__main__":
    model, _ = lp.load("smollm2-135m")
    graph = lp.trace(model)
    scores = lp.score(model, graph, criterion=distance, kinds=["neurons"])
    plan = lp.select(graph, scores, ratio=0.1, kinds=["neurons"])
    print(plan.summary())
