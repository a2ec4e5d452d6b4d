"""Compare two criteria: the share of neurons that both keep, layer by layer."""

import llm_pruner as lp
from llm_pruner.data import calibration

model, tokenizer = lp.load("smollm2-135m")
graph = lp.trace(model)
ids = calibration("python-docs", tokenizer, 8, 64)
plans = [
    lp.select(graph, lp.score(model, graph, ids, criterion, kinds=["neurons"]), 0.5, kinds=["neurons"])
    for criterion in ("taylor", "wanda")
]
for name, choice in plans[0].units.items():
    other = set(plans[1].units[name].kept.tolist())
    both = len(other & set(choice.kept.tolist()))
    print(f"layer {choice.layer:2}: {both / len(other):.2f} of the kept neurons are the same (0.5 by chance)")
