"""A criterion of your own, from any numbers: here, how far a neuron's weights are from those of its peers."""

import torch

import llm_pruner as lp

model, tokenizer = lp.load("smollm2-135m")
graph = lp.trace(model)
values = {}
for unit in graph.of_kind("neurons"):
    features = torch.cat(
        [model.get_parameter(n).detach().movedim(d, 0)[unit.positions(n, d).flatten()] for n, d in unit.dims], dim=1
    )
    values[unit.name] = torch.cdist(features, features.mean(0, keepdim=True)).flatten().double()
plan = lp.select(graph, lp.Scores(values, {"criterion": "distance"}), 0.1, kinds=["neurons"])
print(plan.summary())
