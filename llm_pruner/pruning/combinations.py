"""Combinations of flags of ``prune`` that cannot work, and the flag that combines kinds of units."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..choices import SHAPE, UNGROUPED, Kind
from ..errors import PrunerError
from ..flags import split_list

TARGETS = ("target_params", "target_macs", "target_memory", "target_latency")
SHAPES = ("target_config", *SHAPE)
MODES = ("block_wise", "channel_wise", "layer_wise", "kinds")
RANGES = tuple(f"block_{block}_layer_{end}" for block in ("attention", "mlp") for end in ("start", "end"))
BLOCKS = ("drop_attention", "drop_mlp", "num_attention", "num_mlp")  # of layers
LAYER_LISTS = ("drop_layers", "num_layers", *BLOCKS)
# Flags that cannot be given together, and why.
EXCLUSIVE: tuple[tuple[Sequence[str], Sequence[str], str], ...] = (
    (MODES, MODES, "each names the units to prune"),
    (("kinds",), ("shares",), "each names the units to prune"),
    (TARGETS, (*TARGETS, "pruning_ratio"), "each sets the size of the result"),
    (TARGETS, ("layer_wise", "iterative_steps"), "a target is solved in one step"),
    (
        SHAPES,
        (*TARGETS, "pruning_ratio", "channel_wise", "kinds", "iterative_steps", "round_to", "floor", *RANGES),
        "a target shape determines all widths",
    ),
    (("shares",), RANGES, "proportions are those of all layers"),
    (("target_config",), ("experts_per_token",), "each sets the experts per token"),
    (
        ("uniform",),
        (*RANGES, "global_pruning", *BLOCKS, "layer_wise"),
        "one makes all layers alike, the other makes layers differ",
    ),
    (("num_attention",), ("drop_attention",), "each names the attention to remove"),
    (("num_mlp",), ("drop_mlp",), "each names the MLPs to remove"),
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
    (("compensate",), ("refit_tokens", "refit_minutes"), "only --refit blocks and distill train"),
    (("save_model", "standalone", "push_to_hub"), ("no_save",), "one needs the checkpoint, the other writes none"),
)
# Flags that need one of others.
REQUIRES: tuple[tuple[str, Sequence[str]], ...] = (
    ("layer", ("layer_wise",)),
    ("normalize", ("global_pruning", "experts_per_layer", "allocate")),
    ("search_generations", ("allocate",)),
    ("shares", TARGETS),
)
# The same, where a checkpoint is saved only if a flag asks for it.
REQUIRES_SAVING = (("standalone", ("save_model", "output")), ("push_to_hub", ("save_model", "output")))
# Flags that a search for widths does without, and why.
NOT_SEARCHED = (
    (("global_pruning", "normalize", "experts_per_layer", "shares"), "the search decides how widths differ"),
    (("channel_wise", *SHAPES), "the search is for widths of layers under a budget"),
    (("stream", "device_map"), "the search runs the model hundreds of times on one device"),
)
# Flags that --grouping_strategy none does without: it changes widths of layers once, by a ratio.
NOT_UNGROUPED = (
    *("channel_wise", "layer_wise", *LAYER_LISTS),
    *("iterative_steps", "global_pruning", "allocate", "shares", *TARGETS, *SHAPES),
)


def check_allocation(arguments: Any) -> None:
    """Refuse flags that contradict ``--allocate``.

    Raises:
        PrunerError: as above.
    """
    allocate = arguments.allocate
    if arguments.global_pruning and allocate == "uniform":
        raise PrunerError("--global_pruning and --allocate uniform exclude each other: leave one out")
    if arguments.uniform and allocate == "global":
        raise PrunerError("--uniform and --allocate global exclude each other (one makes all layers alike): give one")
    if allocate == "uniform" and arguments.normalize != "none" and arguments.experts_per_layer != "global":
        raise PrunerError(
            f"--normalize {arguments.normalize} is for indices that are ranked across layers: give --allocate global"
        )
    if allocate != "search":
        if arguments.is_given("search_generations"):
            raise PrunerError(f"--search_generations needs --allocate search, not {allocate}")
        return
    for names, why in NOT_SEARCHED:
        if name := next((name for name in names if arguments.is_given(name)), None):
            raise PrunerError(f"--{name} and --allocate search exclude each other ({why}): leave one out")
    if not any(map(arguments.is_given, TARGETS)):
        raise PrunerError(f"--allocate search needs a budget: add one of {', '.join(f'--{name}' for name in TARGETS)}")
    if {*arguments.kinds} & {"hidden"}:
        raise PrunerError("--allocate search is for widths of layers, not for --kinds hidden: choose other kinds")


def check_ungrouped(arguments: Any, refit: str) -> None:
    """Refuse flags that contradict ``--grouping_strategy none``.

    Args:
        refit: refit of the run, set by a flag or the preset.

    Raises:
        PrunerError: as above.
    """
    if arguments.grouping_strategy != UNGROUPED:
        return
    alone = f"--grouping_strategy {UNGROUPED} ranks every weight of heads and neurons alone"
    if name := next((name for name in NOT_UNGROUPED if arguments.is_given(name)), None):
        raise PrunerError(f"{alone}: leave out --{name}")
    if others := {*arguments.kinds} - {"heads", "neurons"}:
        raise PrunerError(f"{alone}: leave out --kinds {', '.join(sorted(others))}")
    if refit != "none":
        raise PrunerError(f"{alone}, and --refit {refit} reads units: add --refit none, or --preset paper")


def read_shares(text: str | None) -> dict[str, float]:
    """Read proportions of kinds of units; 0 for kinds whose proportion is to be measured.

    Raises:
        PrunerError: an entry is not a proportion, or its kind of unit is not known.

    >>> read_shares("layers=2,neurons=1"), read_shares("measured:heads,neurons")
    ({'layers': 2.0, 'neurons': 1.0}, {'heads': 0.0, 'neurons': 0.0})
    """
    kinds = [kind for kind in Kind.__args__ if kind != "vocabulary"]  # type: ignore[attr-defined]
    mode, _, listed = (text or "").partition(":")
    if mode == "measured":
        shares = dict.fromkeys(split_list(listed) or ["layers", "neurons"], 0.0)
    else:
        shares = dict(map(_share, split_list(text)))
    for kind in shares:
        if kind == "vocabulary":
            raise PrunerError("--shares vocabulary: tokens are pruned by llm-pruner vocab")
        if kind not in kinds:
            raise PrunerError(f"--shares {kind!r} is not valid: choose from {', '.join(kinds)}")
    return shares


def _share(entry: str) -> tuple[str, float]:
    kind, _, value = entry.partition("=")
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not 0 < number < float("inf"):
        raise PrunerError(f"--shares {entry!r} is not valid: give proportions such as layers=2,neurons=1, or measured")
    return kind.strip(), number
