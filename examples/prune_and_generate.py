"""Score once, prune at three ratios, compare. Runs on the embedded model in about two minutes on two cores."""

import llm_pruner as lp
from llm_pruner.data import calibration, text
from llm_pruner.evaluation.perplexity import perplexity, windows
from llm_pruner.models.skeleton import parameter_count

model, tokenizer = lp.load("smollm2-135m")
graph = lp.trace(model)
scores = lp.score(model, graph, calibration("python-docs", tokenizer), kinds=("heads", "neurons"))
held_out = windows(tokenizer, text("python-docs"), 128, 32)
print(f"original: {parameter_count(model):,} parameters, perplexity {perplexity(model, held_out).perplexity:.1f}")
for ratio in (0.1, 0.25, 0.4):
    plan = lp.select(graph, scores, ratio, layers=range(3, 29))
    pruned = lp.apply(model, plan)
    quality = perplexity(pruned, held_out).perplexity
    print(f"ratio {ratio}: {parameter_count(pruned):,} parameters, perplexity {quality:.1f}")
