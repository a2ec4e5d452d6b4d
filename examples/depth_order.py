"""Print the layers that three criteria would remove first from the embedded model."""

import llm_pruner as lp
from llm_pruner.data import calibration

model, tokenizer = lp.load("smollm2-135m")
graph = lp.trace(model)
ids = calibration("python-docs", tokenizer, 4, 128)
for strategy in ("block_influence", "cosine", "loss_change"):
    scores = lp.score(model, graph, ids, strategy).values["model.layers.layers"]
    print(f"{strategy:16} {' '.join(str(i) for i in scores.argsort().tolist()[:10])} ...")
