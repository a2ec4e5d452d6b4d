"""Prune neurons, then quantize the remaining weights to eight bits (pip install torchao).

The pruned model is an ordinary model of transformers, so quantization works as on any other model.
"""

import torch
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import llm_pruner as lp
from llm_pruner.data import calibration, text
from llm_pruner.evaluation.perplexity import perplexity, windows

model, tokenizer = lp.load("smollm2-135m")
held_out = windows(tokenizer, text("python-docs"), 128, 32)
ids = calibration("python-docs", tokenizer, 64)


def show(name: str, model: torch.nn.Module) -> None:
    # A quantized tensor reports the size of the tensor that it stands for; its own data are in its parts.
    size = sum(
        sum(getattr(p, part).nbytes for part in p.tensor_data_names) if hasattr(p, "tensor_data_names") else p.nbytes
        for p in model.parameters()
    )
    print(f"{name:<10} {size / 2**20:6.0f} MiB, perplexity {perplexity(model, held_out).perplexity:.2f}")


show("original", model)
graph = lp.trace(model)
plan = lp.select(graph, lp.score(model, graph, ids, kinds=["neurons"]), 0.2, kinds=["neurons"], layers=range(3, 29))
pruned = lp.apply(model, plan)
lp.compensate(model, pruned, ids)
show("pruned", pruned)
quantize_(pruned, Int8WeightOnlyConfig())
show("quantized", pruned)
