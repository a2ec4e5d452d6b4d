"""Combinations of flags of ``prune`` that cannot work."""

from __future__ import annotations

from collections.abc import Sequence

from ..choices import SHAPE

TARGETS = ("target_params", "target_macs", "target_memory", "target_latency")
SHAPES = ("target_config", *SHAPE)
MODES = ("block_wise", "channel_wise", "layer_wise", "kinds")
RANGES = tuple(f"block_{block}_layer_{end}" for block in ("attention", "mlp") for end in ("start", "end"))
# Flags that cannot be given together, and why.
EXCLUSIVE: tuple[tuple[Sequence[str], Sequence[str], str], ...] = (
    (MODES, MODES, "each names the units to prune"),
    (("kinds",), ("shares",), "each names the units to prune"),
    (TARGETS, (*TARGETS, "pruning_ratio"), "each sets the size of the result"),
    (TARGETS, ("layer_wise", "iterative_steps"), "a target is solved in one step"),
    (SHAPES, (*TARGETS, "channel_wise", "kinds", "iterative_steps"), "a target shape determines all widths"),
    (("target_config",), ("experts_per_token",), "each sets the experts per token"),
    (
        ("uniform",),
        (*RANGES, "global_pruning", "drop_attention", "drop_mlp", "layer_wise"),
        "one makes all layers alike, the other makes layers differ",
    ),
    *((("layer_wise", "drop_layers", "num_layers", "num_hidden_layers"),) * 2 + ("each names the layers to remove",),),
    (("depth",), ("layer_wise", "drop_layers"), "one chooses layers, the other names them"),
    (("layer_wise",), ("global_pruning", "iterative_steps"), "layers are dropped by position"),
    (("layer_wise", "channel_wise"), RANGES, "layer ranges are for heads and neurons"),
    (("calib_tokens",), ("num_examples",), "each sets the size of the calibration set"),
    (("device_map",), ("stream",), "one spreads a model in memory, the other leaves it in its files"),
    (
        ("target_latency",),
        ("stream", "device_map", "channel_wise"),
        "it times layers on one device; use --target_macs",
    ),
    (("compensate",), ("channel_wise",), "compensation compares hidden states of one size"),
    (("compensate",), ("refit",), "each names the refit"),
    (("compensate",), ("refit_tokens", "refit_minutes"), "only --refit blocks and distill train"),
    (("save_model", "standalone", "push_to_hub"), ("no_save",), "one needs the checkpoint, the other writes none"),
)
# Flags that need one of others.
REQUIRES: tuple[tuple[str, Sequence[str]], ...] = (
    ("layer", ("layer_wise",)),
    ("normalize", ("global_pruning", "experts_per_layer")),
    ("shares", TARGETS),
)
# The same, where a checkpoint is saved only if a flag asks for it.
REQUIRES_SAVING = (("standalone", ("save_model", "output")), ("push_to_hub", ("save_model", "output")))
