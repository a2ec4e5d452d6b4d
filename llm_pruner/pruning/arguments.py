"""The arguments of pruning. The flags are LLM-Pruner's, with its names and meanings; those below the line are ours."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..arguments import at_least, device_of, flag, listed, one_of
from ..checkpoint import DEFAULT_MODEL, DTYPES
from ..data import EMBEDDED_TEXT
from ..errors import PrunerError
from ..files import read_json
from ..graph import KINDS, CouplingGraph
from ..importance import AGGREGATIONS, CRITERIA, STRATEGIES, VARIANTS
from ..selection import NORMALIZERS
from ..surgery import METHODS, MIN_SAMPLES, SHAPE
from .presets import PRESETS, middle

# LLM-Pruner's flags that choose a method: giving one means its method.
METHOD = (
    "pruner_type",
    "taylor",
    "grouping_strategy",
    "block_wise",
    "channel_wise",
    "layer_wise",
    "layer",
    "block_attention_layer_start",
    "block_attention_layer_end",
    "block_mlp_layer_start",
    "block_mlp_layer_end",
    "global_pruning",
)
# What a config file says of itself, not of a model's shape.
ABOUT_A_FILE = ("architectures", "transformers_version", "_name_or_path", "dtype", "torch_dtype", "auto_map")
TARGETS = ("target_params", "target_macs", "target_memory", "target_latency")
COMPENSATIONS = ("none", *METHODS)


@dataclass
class PruneArguments:
    """Prune a model and measure it before and after."""

    base_model: str = flag(DEFAULT_MODEL, "alias of the embedded model, hub id, folder, or .gguf file")
    save_ckpt_log_name: str = flag("llama_prune", "name of the run; its folder is prune_log/<name>")
    pruning_ratio: float = flag(0.5, "share of every unit's indices to remove, between 0 and 1")
    pruner_type: str | None = flag(None, "importance criterion: " + ", ".join(CRITERIA))
    taylor: str | None = flag(None, "taylor variant: " + ", ".join(VARIANTS))
    grouping_strategy: str | None = flag(None, "aggregation over the slices of a group: " + ", ".join(AGGREGATIONS))
    num_examples: int | None = flag(None, "samples in the calibration set (default: 128; paper: 10)")

    temperature: float = flag(1.0, "sampling temperature of the test generations")
    top_p: float = flag(0.95, "nucleus of the test generations")
    max_seq_len: int = flag(128, "length of the test generations and of a perplexity window, in tokens")

    block_wise: bool = flag(False, "prune attention heads and MLP neurons of a range of layers (the default)")
    channel_wise: bool = flag(False, "prune hidden channels through the whole model")
    layer_wise: bool = flag(False, "keep only the first --layer layers")
    layer: int | None = flag(None, "layers to keep with --layer_wise (default: 12)")
    block_attention_layer_start: int | None = flag(None, "first layer whose heads are pruned (default: 3)")
    block_attention_layer_end: int | None = flag(None, "layer to stop before (default: the last but one)")
    block_mlp_layer_start: int | None = flag(None, "first layer whose neurons are pruned (default: 3)")
    block_mlp_layer_end: int | None = flag(None, "layer to stop before (default: the last but one)")
    iterative_steps: int = flag(1, "prune in this many steps, scored anew at each")
    global_pruning: bool = flag(False, "rank across layers instead of within each")

    device: str = flag("auto", "device to prune on: auto, cpu, cuda, cuda:1, ...")
    device_map: str | None = flag(None, "auto: spread the layers over all GPUs, and what does not fit over the CPU")
    eval_device: str = flag("auto", "device to evaluate on")
    test_before_train: bool = flag(False, "generate before pruning (perplexity is always measured)")
    test_after_train: bool = flag(False, "generate after pruning (perplexity is always measured)")
    seed: int = flag(42, "seed of everything that is random")
    save_model: bool = flag(False, "write the checkpoint")
    standalone: bool = flag(
        False, "with it, write a modelling file, so that layers that differ load without llm_pruner (trust_remote_code)"
    )

    # Ours.
    drop_layers: str | None = flag(None, "layers to drop, by comma: 4,7; of an encoder-decoder encoder.4,decoder.7")
    num_layers: str | None = flag(None, "layers that stay, chosen by --depth; of an encoder-decoder also 12,6")
    depth: str | None = flag(None, "how layers are chosen (default: loss): " + ", ".join(STRATEGIES))
    depth_examples: int = flag(16, "calibration samples that --depth looks at")
    drop_attention: str | None = flag(None, "layers to take the attention out of, by comma")
    drop_mlp: str | None = flag(None, "layers to take the MLP out of, by comma")
    target_config: str | None = flag(None, "JSON file of the config that the result must have, or of some fields of it")
    hidden_size: int | None = flag(None, "hidden size that the result must have")
    intermediate_size: int | None = flag(None, "MLP neurons a layer that the result must have")
    num_attention_heads: int | None = flag(None, "attention heads that the result must have")
    num_key_value_heads: int | None = flag(None, "key-value heads that the result must have")
    num_hidden_layers: int | None = flag(None, "layers that the result must have (of an encoder-decoder: its encoder)")
    num_decoder_layers: int | None = flag(None, "layers that the decoder of an encoder-decoder must have")
    shares: str | None = flag(
        None,
        "proportions in which kinds of units go until a --target_... is met: layers=2,neurons=1, or measured: by what "
        "each costs the loss (layers and neurons), or measured:KIND,KIND",
    )
    rescale_norms: bool = flag(False, "with hidden channels gone, scale norms to say what they said, on average")
    preset: str | None = flag(
        None,
        "what is not given: best (the default), or paper, LLM-Pruner to the letter (the default as soon as one of its "
        "flags that choose a method is given)",
    )
    push_to_hub: str | None = flag(None, "with --save_model, put the run on the hub as well, as user/name")
    calib_dataset: str = flag(
        EMBEDDED_TEXT, "calibration text: python-docs, bookcorpus, c4, wikitext2, ptb, or a .txt, .json or .jsonl file"
    )
    calib_seq_len: int | None = flag(None, "tokens in a calibration sample (default: 128; paper: 64)")
    calib_seed: int | None = flag(None, "draw calibration samples at random with this seed (default: the first ones)")
    eval_datasets: str = flag(EMBEDDED_TEXT, "texts to measure perplexity on, by comma ('' for none)")
    max_windows: int = flag(0, "use only the first N windows of each text (0: all)")
    normalize: str = flag("none", "divide global scores by, to compare layers: " + ", ".join(NORMALIZERS))
    floor: float = flag(0.0, "share of every unit's indices that stays in any case")
    target_params: str | None = flag(None, "parameters that stay, instead of a ratio: 0.8 of the model, or 5.4B")
    target_macs: str | None = flag(None, "multiply-accumulates of a forward pass that stay: 0.8, or 10G")
    target_memory: str | None = flag(None, "memory of weights and cache that stays: 0.8, or 6GiB")
    target_latency: str | None = flag(None, "time of a forward pass on --device that stays: 0.8, or 30ms")
    budget_tokens: int = flag(2048, "length at which --target_macs, --target_memory and --target_latency are meant")
    budget_batch: int = flag(1, "sequences at which --target_memory and --target_latency are meant")
    compensate: str | None = flag(None, "refit projections of each layer afterwards: " + ", ".join(COMPENSATIONS))
    self_examples: int | None = flag(
        None, "samples that the model writes itself, for --compensate beside those of the text (default: 128; paper: 0)"
    )
    stream: bool = flag(
        False, "keep weights mapped from their files and bring them in block by block, for large models"
    )
    round_to: int = flag(1, "keep multiples of this many indices")
    tensor_parallel: int = flag(1, "keep widths that so many devices can share, with as much removed of each's part")
    hardware_align: bool | None = flag(None, "keep widths in multiples that kernels like (default: true; paper: false)")
    dtype: str = flag("auto", "of the weights: " + ", ".join(DTYPES) + " (auto: float32 on cpu)")
    trust_remote_code: bool = flag(False, "run modelling code that comes with the checkpoint")
    output_root: str = flag("prune_log", "folder of the runs")
    score_cache: str | None = flag(None, "keep what scoring finds in this folder, and use it again for other ratios")

    def check(self) -> None:
        """Refuse what cannot work before anything is loaded, and resolve ``auto`` devices.

        Raises:
            PrunerError: with the one line that the user reads.
        """
        self._fill_in()
        one_of(
            self,
            pruner_type=CRITERIA,
            taylor=VARIANTS,
            grouping_strategy=AGGREGATIONS,
            dtype=DTYPES,
            compensate=COMPENSATIONS,
            normalize=NORMALIZERS,
        )
        self._check_depth()
        modes = [m for m in ("block_wise", "channel_wise", "layer_wise") if getattr(self, m)]
        if len(modes) > 1:
            raise PrunerError(f"--{' and --'.join(modes)} exclude each other: give one")
        if not self.layer_wise and not 0 < self.pruning_ratio < 1:
            raise PrunerError(f"--pruning_ratio {self.pruning_ratio} is out of range: give a share between 0 and 1")
        for name in ("standalone", "push_to_hub"):
            if getattr(self, name) and not self.save_model:
                raise PrunerError(f"--{name} goes with --save_model")
        if self.layer is not None and not self.layer_wise:
            raise PrunerError("--layer goes with --layer_wise")
        self.layer = 12 if self.layer is None else self.layer
        ranges = [f"block_{what}_layer_{end}" for what in ("attention", "mlp") for end in ("start", "end")]
        if not modes or self.block_wise:
            ranges = []
        for name in ranges:
            if getattr(self, name) is not None:
                raise PrunerError(f"--{name} goes with --block_wise, not with --{modes[0]}")
        if not 0 <= self.floor < 1:
            raise PrunerError(f"--floor {self.floor} is out of range: give a share of at least 0 and below 1")
        if self.normalize != "none" and not self.global_pruning:
            raise PrunerError("--normalize compares layers: it goes with --global_pruning")
        targets = [name for name in TARGETS if getattr(self, name) is not None]
        if len(targets) > 1:
            raise PrunerError(f"--{' and --'.join(targets)} exclude each other: give one")
        if targets and (self.layer_wise or self.iterative_steps > 1):
            raise PrunerError(f"--{targets[0]} is solved in one step: give no --layer_wise and no --iterative_steps")
        self.proportions()
        if self.shares and not targets:
            raise PrunerError(f"--shares are proportions: say with one of --{', --'.join(TARGETS)} how much goes")
        if self.shape and (targets or self.channel_wise or self.iterative_steps > 1):
            raise PrunerError("a target shape says all: give no --target_..., --channel_wise or --iterative_steps")
        if self.device_map not in (None, "auto"):
            raise PrunerError(f"unknown --device_map {self.device_map!r}; give auto or leave it out")
        if self.device_map and self.stream:
            raise PrunerError("--device_map spreads a model in memory and --stream leaves it in its files: give one")
        if self.target_latency is not None and (self.stream or self.device_map or self.channel_wise):
            raise PrunerError(
                "--target_latency times the layers of a model on one device: give no --stream, --device_map or "
                "--channel_wise, or else --target_macs"
            )
        if not 0 <= self.seed < 2**32:
            raise PrunerError(f"--seed {self.seed} is out of range: give 0 to 4294967295")
        at_least(
            self,
            1,
            "num_examples",
            "iterative_steps",
            "round_to",
            "tensor_parallel",
            "layer",
            "budget_batch",
            "budget_tokens",
        )
        if self.compensate != "none":
            if self.channel_wise:
                raise PrunerError("--compensate goes with --block_wise: it needs layers of the same hidden size")
            if self.num_examples is not None and self.num_examples < MIN_SAMPLES:
                raise PrunerError(
                    f"--compensate {self.compensate} needs --num_examples of at least {MIN_SAMPLES}, better 128; give "
                    "more, --compensate none or --preset paper"
                )
        at_least(self, 0, "self_examples")
        if self.temperature <= 0 or not 0 < self.top_p <= 1:
            raise PrunerError(f"--temperature {self.temperature} --top_p {self.top_p}: give above 0, and within 0 to 1")
        if self.max_seq_len < 2 or int(self.calib_seq_len or 0) < 2 or self.max_windows < 0:
            raise PrunerError("--max_seq_len and --calib_seq_len are at least 2 tokens, --max_windows at least 0")
        if self.layer_wise and (self.global_pruning or self.iterative_steps > 1):
            raise PrunerError(
                "--layer_wise drops layers by position: --global_pruning and --iterative_steps mean nothing"
            )
        name = self.save_ckpt_log_name
        if not name or name in (".", "..") or "/" in name or not name.isprintable() or len(name) > 200:
            raise PrunerError(f"--save_ckpt_log_name {name[:40]!r} must be a plain folder name")
        self.device, self.eval_device = device_of("device", self.device), device_of("eval_device", self.eval_device)

    def _check_depth(self) -> None:
        asked = [
            n for n in ("layer_wise", "drop_layers", "num_layers", "num_hidden_layers") if _given(getattr(self, n))
        ]
        if len(asked) > 1:
            raise PrunerError(f"--{' and --'.join(asked)} all say which layers go: give one")
        if self.depth is not None:
            one_of(self, depth=STRATEGIES)
            if self.layer_wise or self.drop_layers:
                raise PrunerError(f"--depth chooses layers, and --{asked[0]} names them: give one")
        self.depth = "last" if self.layer_wise else self.depth or "loss"
        at_least(self, 1, "depth_examples", *(name for name in SHAPE if name != "num_hidden_layers"))
        for name in ("drop_layers", "num_layers", "drop_attention", "drop_mlp"):
            self.numbers(name)

    def numbers(self, name: str) -> list[tuple[str, int]]:
        """The entries of a flag such as ``4,7`` or ``encoder.4,decoder.7``: where, and the number.

        Raises:
            PrunerError: an entry is no number.
        """
        out = []
        for entry in listed(getattr(self, name)):
            where, _, number = entry.rpartition(".")
            if not number.isdecimal():
                raise PrunerError(f"--{name} {entry!r} is no number: give them by comma, such as 4,7 or encoder.4")
            out.append((where, int(number)))
        return out

    @cached_property
    def shape(self) -> dict[str, Any]:
        """The fields of a config that the result must have.

        Raises:
            PrunerError: the file of --target_config cannot be read.
        """
        out: dict[str, Any] = {}
        if self.target_config:
            out = read_json(self.target_config)
            if not isinstance(out, dict):
                raise PrunerError(f"--target_config {self.target_config} holds no config: give an object of fields")
            for name in ABOUT_A_FILE:
                out.pop(name, None)
        return out | {name: getattr(self, name) for name in SHAPE if getattr(self, name) is not None}

    @property
    def drops(self) -> bool:
        """Whether whole layers, or blocks of them, are named or chosen to go, beside or instead of widths."""
        asked = (self.layer_wise, self.drop_layers, self.num_layers, self.drop_attention, self.drop_mlp)
        return any(map(_given, asked))

    @property
    def widths(self) -> bool:
        """Whether widths are pruned: unless only layers are to go."""
        targets = any(getattr(self, name) is not None for name in TARGETS)
        return not self.drops or self.block_wise or self.channel_wise or targets or bool(self.shape)

    def proportions(self) -> dict[str, float] | None:
        """What ``--shares`` says; the kinds with nothing said where they are to be measured.

        Raises:
            PrunerError: it is not understood.
        """
        if not self.shares:
            return None
        out: dict[str, float] = {}
        if self.shares.partition(":")[0] == "measured":
            kinds = listed(self.shares.partition(":")[2])
            out = dict.fromkeys(kinds or ("layers", "neurons"), 0.0)
        for part in [] if out else self.shares.split(","):
            kind, _, value = part.partition("=")
            try:
                out[kind.strip()] = float(value)
            except ValueError:
                out[kind.strip()] = -1.0
            if not 0 < out[kind.strip()] < float("inf"):
                raise PrunerError(f"--shares {part!r} is no proportion: give them as layers=2,neurons=1, or measured")
        for kind in out:
            if kind == "vocabulary" or kind not in KINDS:
                known = ", ".join(k for k in KINDS if k != "vocabulary")
                raise PrunerError(f"--shares {kind!r}: choose from {known} (tokens are cut by llm-pruner vocab)")
        return out

    def _fill_in(self) -> None:
        """Take from a preset what is not given."""
        chosen = self.iterative_steps > 1 or any(_given(getattr(self, name)) for name in METHOD)
        self.preset = self.preset or ("paper" if chosen else "best")
        if self.preset not in PRESETS:
            raise PrunerError(f"unknown --preset {self.preset!r}; choose from {', '.join(PRESETS)}")
        self.by_preset: set[str] = {name for name in PRESETS[self.preset] if getattr(self, name) is None}
        for name in self.by_preset:
            setattr(self, name, PRESETS[self.preset][name])
        if self.preset == "best" and self.channel_wise and "compensate" in self.by_preset:
            self.compensate = "none"
        self.pruner_type = str(self.pruner_type).lower()

    def kinds(self, graph: CouplingGraph) -> tuple[str, ...]:
        """The kinds of units to prune in a given model."""
        if self.channel_wise:
            return ("hidden",)
        attention = (self.block_wise, self.block_attention_layer_start, self.block_attention_layer_end)
        if self.preset == "paper" or any(map(_given, attention)):
            return ("heads", "neurons")
        present = [kind for kind in ("neurons", "heads", "channels") if graph.of_kind(kind)]
        return tuple(present[:1]) or ("neurons",)

    def layers(self, graph: CouplingGraph) -> dict[str, Iterable[int]] | None:
        """The layers of each kind that the ``--block_*`` flags name, for a given model.

        Raises:
            PrunerError: the range lies outside the model.
        """
        if self.channel_wise:
            return None
        numbers = [unit.layer for unit in graph.units if unit.layer is not None]
        if not numbers:
            raise PrunerError("the architecture has no layers in which anything can be pruned")
        count = max(numbers) + 1
        usual = middle(count) if self.preset == "best" else range(min(3, count - 1), count - 1)
        out: dict[str, Iterable[int]] = {}
        for kind, what in (("heads", "attention"), ("neurons", "mlp")):
            start, end = getattr(self, f"block_{what}_layer_start"), getattr(self, f"block_{what}_layer_end")
            start = usual.start if start is None else start
            end = max(usual.stop, start + 1) if end is None else end
            if not 0 <= start < end <= count:
                raise PrunerError(
                    f"--block_{what}_layer_start {start} --block_{what}_layer_end {end} is out of range: the model has "
                    f"layers 0 to {count - 1}, and the end is not included"
                )
            out[kind] = range(start, end)
        out["channels"] = out["neurons"]
        # What a range leaves without units, as dense layers before a mixture's, cannot be asked for.
        present = {kind: {u.layer for u in graph.of_kind(kind)} for kind in out}
        return {kind: [i for i in chosen if i in present[kind]] for kind, chosen in out.items() if present[kind]}


def _given(value: object) -> bool:
    return value is not None and value is not False
