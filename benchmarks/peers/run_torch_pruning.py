"""Prune by Torch-Pruning's high-level pruner.

    python run_torch_pruning.py --model FOLDER --calibration ids.safetensors --method width --target 0.8 --output FOLDER

``width`` is its example for language models: hidden size, query heads and neurons of all layers in one ratio, by
group norm. ``neurons`` leaves attention and hidden size as they are and takes Taylor scores of the calibration tokens.
"""

from __future__ import annotations

import math

import torch_pruning as tp
from runner import Job, closest_ratio, parameter_count, run
from transformers import PreTrainedModel

ROUND_TO = 4  # of the example


def prune(model: PreTrainedModel, job: Job) -> None:
    """Prune all layers; method: width or neurons."""
    every_width = job.method == "width"
    size = parameter_count(model)
    ratio = closest_ratio(lambda ratio: parameters_at(model, ratio, every_width=every_width), job.target, size)
    attentions = [layer.self_attn for layer in model.model.layers]
    config = model.config
    heads = {attention.q_proj: config.num_attention_heads for attention in attentions} | {
        projection: config.num_key_value_heads
        for attention in attentions
        for projection in (attention.k_proj, attention.v_proj)
    }
    if not every_width:
        for sample in job.ids:
            model(sample[None], labels=sample[None]).loss.backward()
    pruner = tp.pruner.BasePruner(
        model,
        example_inputs=job.ids[:1, :8],
        importance=tp.importance.GroupMagnitudeImportance() if every_width else tp.importance.GroupTaylorImportance(),
        pruning_ratio=ratio,
        ignored_layers=[model.lm_head] if every_width else [model.lm_head, model.model.embed_tokens, *attentions],
        num_heads=heads if every_width else {},
        prune_num_heads=every_width,
        prune_head_dims=False,
        head_pruning_ratio=ratio if every_width else 0.0,
        round_to=ROUND_TO,
    )
    pruner.step()


def parameters_at(model: PreTrainedModel, ratio: float, *, every_width: bool) -> int:
    """Return the size that Torch-Pruning's rounding gives."""
    config, attention = model.config, model.model.layers[0].self_attn
    hidden, heads, groups = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    if every_width:
        hidden = kept(hidden, ratio)
        heads -= groups * math.ceil(math.ceil(ratio * heads) / groups)
    queries, keys = heads * attention.head_dim, groups * attention.head_dim
    layer = 2 * hidden * (queries + keys) + 3 * hidden * kept(config.intermediate_size, ratio) + 2 * hidden
    if attention.q_proj.bias is not None:
        layer += queries + 2 * keys
    embeddings = config.vocab_size * hidden * (1 if config.tie_word_embeddings else 2)
    return embeddings + config.num_hidden_layers * layer + hidden


def kept(width: int, ratio: float) -> int:
    """Round a pruned width down to a multiple."""
    return int(width * (1 - ratio)) // ROUND_TO * ROUND_TO


if __name__ == "__main__":
    run(prune)
