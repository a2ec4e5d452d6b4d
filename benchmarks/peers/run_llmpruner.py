"""Prune by LLM-Pruner's own modules, as its llama3.py does with --block_wise: heads and neurons by Taylor scores.

    git clone https://github.com/horseee/LLM-Pruner
    python run_llmpruner.py --source LLM-Pruner --model FOLDER --calibration ids.safetensors --method param_first \\
        --target 0.8 --output FOLDER

Differs from its script where the comparison needs it: the calibration tokens come from a file, any class with Llama's
names is taken, and safetensors are saved, where its script pickles the module. Its first three layers and its last one
stay, which is its choice on LLaMA-7B.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from runner import Job, closest_ratio, parameter_count, run
from transformers import PreTrainedModel

FIRST_LAYERS_SPARED, LAST_LAYERS_SPARED = 3, 1
PROMPT = torch.tensor([[1, 306, 4658, 278, 6593, 310, 2834, 338], [1, 3439, 17632, 1925, 29892, 278, 6368, 310]])


def prune(model: PreTrainedModel, job: Job) -> None:
    """Prune heads and neurons of the middle layers; method: vectorize, param_first, param_second or param_mix."""
    sys.path.insert(0, str(job.source))
    from LLMPruner.pruner import hf_llama_pruner
    from LLMPruner.torch_pruning.pruner import MetaPruner

    layers = model.model.layers[FIRST_LAYERS_SPARED:-LAST_LAYERS_SPARED]
    ratio = closest_ratio(lambda ratio: parameters_at(model, layers, ratio), job.target, parameter_count(model))
    pruner = MetaPruner(
        model,
        PROMPT,
        importance=hf_llama_pruner.TaylorImportance(group_reduction="sum", taylor=job.method),
        global_pruning=False,
        iterative_steps=1,
        ch_sparsity=ratio,
        ignored_layers=[],
        channel_groups={},
        consecutive_groups={layer.self_attn.k_proj: layer.self_attn.head_dim for layer in model.model.layers},
        customized_pruners={type(model.model.norm): hf_llama_pruner.hf_rmsnorm_pruner},
        root_module_types=None,
        root_instances=[layer.self_attn.k_proj for layer in layers] + [layer.mlp.gate_proj for layer in layers],
    )
    model.zero_grad()
    if job.method in ("param_second", "param_mix"):
        accumulate_squares(model, job.ids)
    model(job.ids, labels=job.ids).loss.backward()
    pruner.step()


def accumulate_squares(model: PreTrainedModel, ids: torch.Tensor) -> None:
    """Leave the mean square of each sample's gradient in ``acc_grad``, where LLM-Pruner reads it."""
    for sample in ids:
        model(sample[None], labels=sample[None]).loss.backward()
        for parameter in model.parameters():
            square = parameter.grad * parameter.grad / len(ids)
            parameter.acc_grad = parameter.acc_grad + square if hasattr(parameter, "acc_grad") else square
        model.zero_grad()


def parameters_at(model: PreTrainedModel, layers: Any, ratio: float) -> int:
    """Return the size that LLM-Pruner's rounding gives: n - int(n * (1 - ratio)) channels go, heads as a whole."""
    removed = 0
    for layer in layers:
        attention, mlp = layer.self_attn, layer.mlp
        width, neurons = attention.k_proj.out_features, mlp.gate_proj.out_features
        channels = (width - int(width * (1 - ratio))) // attention.head_dim * attention.head_dim
        removed += channels * per_channel(attention, ("q_proj", "k_proj", "v_proj", "o_proj"), width)
        gone = neurons - int(neurons * (1 - ratio))
        removed += gone * per_channel(mlp, ("gate_proj", "up_proj", "down_proj"), neurons)
    return parameter_count(model) - removed


def per_channel(block: torch.nn.Module, names: tuple[str, ...], width: int) -> int:
    """Count the parameters of a block's projections for each channel; an output's bias stays."""
    weights = sum(getattr(block, name).weight.numel() for name in names)
    biases = [getattr(block, name).bias for name in names[:-1]]
    return (weights + sum(bias.numel() for bias in biases if bias is not None)) // width


if __name__ == "__main__":
    run(prune)
