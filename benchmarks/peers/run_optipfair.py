"""Prune by OptiPFair: neurons of every layer by the span of their weights, its MLP_GLU method.

python run_optipfair.py --model FOLDER --calibration ids.safetensors --method static --target 0.8 --output FOLDER
"""

from __future__ import annotations

import optipfair
from runner import Job, closest_ratio, parameter_count, run
from torch.utils.data import DataLoader
from transformers import PreTrainedModel


def prune(model: PreTrainedModel, job: Job) -> None:
    """Prune neurons; method: static (weights alone) or data (weights and activations of the calibration tokens)."""
    mlps = [layer.mlp for layer in model.model.layers]
    neurons, size = mlps[0].gate_proj.out_features, parameter_count(model)
    per_neuron = sum(sum(p.numel() for p in mlp.parameters()) for mlp in mlps) // neurons
    ratio = closest_ratio(lambda ratio: size - int(neurons * ratio) * per_neuron, job.target, size)
    samples = [{"input_ids": ids, "attention_mask": ids.new_ones(len(ids))} for ids in job.ids]
    optipfair.prune_model(
        model,
        pruning_type="MLP_GLU",
        neuron_selection_method="MAW",
        pruning_percentage=100 * ratio,
        dataloader=DataLoader(samples, batch_size=1) if job.method == "data" else None,
        show_progress=False,
    )


if __name__ == "__main__":
    run(prune)
