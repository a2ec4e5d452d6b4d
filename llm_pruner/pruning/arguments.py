"""Flags of ``hf_prune.py`` and ``llm-pruner prune``: LLM-Pruner's names and meanings, then this project's."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ..choices import (
    DEFAULT_MODEL,
    GENERAL,
    SHAPE,
    Aggregation,
    Allocation,
    Compensation,
    Dtype,
    ExpertsPerLayer,
    Kind,
    LayerCriterion,
    Normalizer,
    Preset,
    Refit,
    TaylorVariant,
    Tower,
)
from ..errors import PrunerError
from ..flags import Arguments, Share, check_at_least, check_combinations, default_of, flag
from .combinations import (
    EXCLUSIVE,
    LAYER_LISTS,
    MODES,
    RANGES,
    REQUIRES,
    REQUIRES_SAVING,
    TARGETS,
    check_allocation,
    read_shares,
)


@dataclass(kw_only=True)
class PruneArguments(Arguments):
    """Flags of ``llm-pruner prune``."""

    model: str = flag(
        DEFAULT_MODEL,
        "alias of the embedded model, hub id, folder, or .gguf file",
        group="model",
        aliases=("base_model",),
    )
    device: str = flag("auto", "device to prune on: auto, cpu, cuda, cuda:1, mps, ...", group="model")
    device_map: str | None = flag(
        None, "auto: spread the layers over all GPUs; layers that do not fit stay on the CPU", group="model"
    )
    dtype: Dtype = flag("auto", "dtype of the weights (auto is float32 on CPU)", group="model")
    stream: bool = flag(
        False, "offload: keep weights memory-mapped and load them block by block, for large models", group="model"
    )
    trust_remote_code: bool = flag(False, "run modelling code that comes with the checkpoint", group="model")
    task: str | None = flag(
        None, "load the class of this task, such as text-generation, instead of the declared class", group="model"
    )

    preset: Preset = flag(
        "best",
        "defaults of the other flags (fast: best on less text, in a third of the time; paper: as in LLM-Pruner)",
        group="method",
    )
    kinds: list[Kind] = flag([], "kinds of units to prune (default: set by the preset)", group="method")
    towers: Tower = flag(
        "language", "parts to prune of a model that reads images or sounds and writes text", group="method"
    )
    block_wise: bool = flag(False, "prune attention heads and MLP neurons of a range of layers", group="method")
    channel_wise: bool = flag(False, "prune hidden channels through the whole model", group="method")
    pruner_type: str | None = flag(
        None,
        "importance criterion: random, l1, l2, taylor, activation, wanda, flap; of experts reap, ean, frequency, mone, "
        "expert_loss, expert_cosine; or your own as package.module:function "
        "(default: taylor)",
        group="method",
    )
    taylor: TaylorVariant | None = flag(
        None, "variant of taylor (default: param_second, set by the preset)", group="method"
    )
    grouping_strategy: Aggregation | None = flag(
        None,
        "aggregation of scores over the weights of a unit (default: sum; none: every weight keeps indices of its own, "
        "an ablation that breaks the model)",
        group="method",
    )
    allocate: Allocation | None = flag(
        None,
        "widths of the layers: uniform, each loses the same share; global, by ranking indices across layers; search, "
        "by evolution, which measures refitted models (default: uniform, or global with --global_pruning)",
        group="method",
    )
    search_generations: int = flag(24, "generations of --allocate search", group="method")
    global_pruning: bool = flag(False, "LLM-Pruner's name of --allocate global", group="method")
    normalize: Normalizer = flag(
        "none",
        "with --allocate global, normalise the scores of a unit before ranking (default: none; mean with "
        "--experts_per_layer global)",
        group="method",
    )
    experts_per_layer: ExpertsPerLayer | None = flag(
        None,
        "number of experts that layers keep: uniform, the same in every layer, or global, by the scores of all layers "
        "(default: uniform, or global with --allocate global)",
        group="method",
    )
    experts_per_token: int | None = flag(
        None, "experts that a router chooses per token, fewer than in the original", group="method"
    )
    protect_super_experts: bool | None = flag(
        None,
        "keep the few experts whose outputs are extremely large (default: true with criteria that read the outputs of "
        "experts)",
        group="method",
    )
    iterative_steps: int = flag(1, "number of pruning steps, each with new scores", group="method")
    refit: Refit | None = flag(
        None,
        "refit without labels on the calibration set after pruning; blocks, distill and lora train on top of ridge "
        "(default: lora, set by the preset)",
        group="method",
    )
    refit_tokens: int | None = flag(
        None,
        "tokens that --refit lora or distill trains on in all, and --refit blocks on each block (default: 98304, set "
        "by the preset)",
        group="method",
    )
    refit_minutes: float | None = flag(
        None,
        "minutes that --refit lora, distill or blocks trains at most; the result then depends on the speed",
        group="method",
    )
    compensate: Compensation | None = flag(
        None, "earlier name of --refit none, ridge (least_squares) or bias", group="method"
    )
    rescale_norms: bool = flag(
        False, "rescale norms to their original outputs when hidden channels are removed", group="method"
    )
    seed: int = flag(42, "seed of random scores and of sampling", group="method")

    block_attention_layer_start: int | None = flag(None, "first layer whose heads are pruned", group="layers")
    block_attention_layer_end: int | None = flag(None, "layer before which pruning of heads stops", group="layers")
    block_mlp_layer_start: int | None = flag(None, "first layer whose neurons are pruned", group="layers")
    block_mlp_layer_end: int | None = flag(None, "layer before which pruning of neurons stops", group="layers")
    layer_wise: bool = flag(False, "keep only the first --layer layers", group="layers")
    layer: int | None = flag(None, "number of layers kept by --layer_wise (default: 12)", group="layers")
    drop_layers: list[str] = flag(
        [], "layers to remove: 4,7, or encoder.4,decoder.7 for an encoder-decoder", group="layers"
    )
    num_layers: list[str] = flag(
        [], "number of layers to keep, chosen by --depth: 22, or 12,6 for an encoder-decoder", group="layers"
    )
    depth: LayerCriterion | None = flag(
        None,
        "criterion that chooses whole layers, and layers that lose attention or MLP (default: loss; cosine for models "
        "that predict no next token)",
        group="layers",
    )
    depth_examples: int = flag(16, "calibration samples that --depth is measured on", group="layers")
    drop_attention: list[str] = flag([], "layers whose attention is removed: 20,21", group="layers")
    drop_mlp: list[str] = flag([], "layers whose MLP is removed: 3", group="layers")
    num_attention: list[str] = flag(
        [], "number of layers that keep their attention, chosen by --depth: 24, or decoder.4", group="layers"
    )
    num_mlp: list[str] = flag([], "number of layers that keep their MLP, chosen by --depth", group="layers")

    target_config: str | None = flag(
        None, "JSON file with the config of the pruned model, or some of its fields", group="shape"
    )
    hidden_size: int | None = flag(None, "hidden size of the pruned model", group="shape")
    intermediate_size: int | None = flag(None, "MLP neurons per layer of the pruned model", group="shape")
    num_attention_heads: int | None = flag(None, "attention heads per layer of the pruned model", group="shape")
    num_key_value_heads: int | None = flag(None, "key-value heads per layer of the pruned model", group="shape")
    num_hidden_layers: int | None = flag(
        None, "layers of the pruned model (of an encoder-decoder: of its encoder)", group="shape"
    )
    num_decoder_layers: int | None = flag(None, "decoder layers of the pruned encoder-decoder", group="shape")

    pruning_ratio: Share = flag(0.5, "share of every unit's indices to remove, above 0 and below 1", group="budget")
    target_params: str | None = flag(
        None, "parameters that stay, instead of a ratio: a fraction (0.8, 80%) or an amount (5.4B)", group="budget"
    )
    target_macs: str | None = flag(
        None, "multiply-accumulates per forward pass that stay: a fraction (0.8) or an amount (10G)", group="budget"
    )
    target_memory: str | None = flag(
        None, "memory of weights and cache that stays: a fraction (0.8) or an amount (6GiB)", group="budget"
    )
    target_latency: str | None = flag(
        None, "time per forward pass on --device that stays: a fraction (0.8) or an amount (30ms)", group="budget"
    )
    budget_tokens: int = flag(2048, "tokens per sequence for --target_macs, _memory and _latency", group="budget")
    budget_batch: int = flag(1, "sequences per batch for --target_macs, _memory and _latency", group="budget")
    shares: str | None = flag(
        None,
        "proportions in which a target removes kinds of units: layers=2,neurons=1, or measured[:KIND,KIND], by how "
        "much each kind raises the loss",
        group="budget",
    )
    floor: Share = flag(0.0, "share of every unit's indices that always stays", group="budget")
    round_to: int = flag(1, "keep a multiple of N indices in every unit", group="budget")
    tensor_parallel: int = flag(1, "keep widths that N devices can share equally", group="budget")
    uniform: bool = flag(
        False,
        "keep the same number of indices in every layer: a plain checkpoint, which other engines read "
        "(default: layers differ)",
        group="budget",
    )
    hardware_align: bool | None = flag(
        None,
        "keep multiples of the widths at which kernels are fast (default: true, set by the preset)",
        group="budget",
    )

    calib_dataset: str | None = flag(
        None,
        "calibration text: self (the model writes it), general, python-docs, bookcorpus, c4, wikitext2, ptb, a .txt, "
        ".json or .jsonl file, or several, c4:0.5,self:0.5 (default: self; paper: bookcorpus, or self where the hub "
        "cannot be reached); images or sounds: a folder, or owner/name on the hub",
        group="calibration",
    )
    calib_tokens: str | None = flag(
        None, "tokens in the calibration set, such as 1M, instead of --num_examples", group="calibration"
    )
    calib_packing: bool = flag(
        False,
        "join documents and cut samples side by side, so that short documents count too (default: one sample a "
        "document while there are enough)",
        group="calibration",
    )
    num_examples: int | None = flag(
        None,
        "samples in the calibration set, at least 32 with --refit (default: 128, set by the preset)",
        group="calibration",
    )
    calib_seq_len: int | None = flag(
        None, "tokens per calibration sample (default: 128, set by the preset)", group="calibration"
    )
    calib_seed: int | None = flag(
        None, "draw calibration samples at random with this seed (default: take the first)", group="calibration"
    )
    bos: bool | None = flag(
        None,
        "begin every window, of calibration and evaluation, with the tokens that the tokenizer puts before a text, "
        "such as BOS (default: true; false as in LLM-Pruner, set by paper)",
        group="calibration",
    )
    self_examples: int | None = flag(
        None,
        "additional samples for --refit, written by the model itself (default: 128, set by the preset)",
        group="calibration",
    )
    score_cache: str | None = flag(
        None, "folder that keeps scores, for runs with other ratios or aggregations", group="calibration"
    )

    output: str | None = flag(
        None, "folder of the run and its checkpoint (default: OUTPUT_ROOT/SAVE_CKPT_LOG_NAME)", group="output"
    )
    output_root: str = flag("prune_log", "parent folder of the runs", group="output")
    save_ckpt_log_name: str = flag(
        "llama_prune",
        "name of the run's folder in --output_root; NAME-2 and so on if it holds another run",
        group="output",
    )
    save_model: bool = flag(
        False, "save the checkpoint (default: yes; hf_prune.py: only with this flag or --output)", group="output"
    )
    no_save: bool = flag(False, "write only plan, metrics and log, no checkpoint", group="output")
    fresh: bool = flag(
        False, "begin anew (default: go on with what the same run had done when it was stopped)", group="output"
    )
    quiet: bool = flag(False, "show no progress and no log, only results, warnings and errors", group="output")
    standalone: bool = flag(
        False, "also save a modelling file, so that per-layer checkpoints load without llm_pruner", group="output"
    )
    dequantize: bool = flag(
        False, "write a quantized model in 16 bits (default: slice its quantized files)", group="output"
    )
    push_to_hub: str | None = flag(None, "upload the run's folder to the hub, as user/name", group="output")
    eval_datasets: list[str] = flag([GENERAL], "texts to measure perplexity on ('' for none)", group="output")
    max_windows: int = flag(0, "use only the first N windows of each text (0: all)", group="output")
    eval_device: str = flag("auto", "device to evaluate on", group="output")
    max_seq_len: int = flag(128, "tokens per perplexity window and test generation", group="output")
    test_before_train: bool = flag(False, "generate text before pruning", group="output")
    test_after_train: bool = flag(False, "generate text after pruning", group="output")
    temperature: float = flag(1.0, "sampling temperature of test generations", group="output")
    top_p: Share = flag(0.95, "nucleus (top-p) probability of test generations", group="output")

    @property
    def ranks_globally(self) -> bool:
        """True if indices are ranked across layers."""
        return self.global_pruning or self.allocate == "global"

    @property
    def saves_checkpoint(self) -> bool:
        """True if the run leaves a checkpoint."""
        return not self.no_save

    def is_given(self, name: str) -> bool:
        """Return True if a flag has another value than its default."""
        default = next(default_of(one) for one in fields(self) if one.name == name)
        return getattr(self, name) != default

    def check(self) -> None:
        """Refuse what cannot work, before anything is loaded.

        Raises:
            PrunerError: flags exclude or need each other, or a value is out of range.
        """
        check_combinations(self, EXCLUSIVE, REQUIRES)
        self._check_ranges()
        check_allocation(self)
        for name in LAYER_LISTS:
            self.layer_numbers(name)
        self._check_experts()
        name = self.save_ckpt_log_name
        if not name or name in (".", "..") or "/" in name or not name.isprintable() or len(name) > 200:
            raise PrunerError(f"--save_ckpt_log_name {name[:40]!r} must be a plain folder name")
        if "vocabulary" in self.kinds:
            raise PrunerError("--kinds vocabulary: tokens are pruned by llm-pruner vocab")

    def _check_experts(self) -> None:
        if "experts" not in (*self.kinds, *read_shares(self.shares)):
            for name in ("experts_per_layer", "protect_super_experts"):
                if getattr(self, name) is not None:
                    raise PrunerError(f"--{name} is about the experts that go: add --kinds experts")
        alone = not any(map(self.is_given, (*MODES, *TARGETS, "shares")))
        if self.experts_per_token is not None and alone and self.is_given("pruning_ratio"):
            raise PrunerError("--pruning_ratio beside --experts_per_token says not of what: add --kinds experts")
        if self.uniform and self.experts_per_layer == "global":
            raise PrunerError("--uniform and --experts_per_layer global exclude each other: give one")
        if self.experts_per_layer == "uniform" and self.normalize != "none" and not self.ranks_globally:
            raise PrunerError("--normalize is for experts that are ranked together: add --experts_per_layer global")

    def _check_ranges(self) -> None:
        if not self.layer_wise and not 0 < self.pruning_ratio < 1:
            raise PrunerError(
                f"--pruning_ratio {self.pruning_ratio} is out of range: give a share between 0 and 1 (0.2 or 20%)"
            )
        if not 0 <= self.floor < 1:
            raise PrunerError(f"--floor {self.floor} is out of range: give a share of at least 0 and below 1")
        if self.device_map not in (None, "auto"):
            raise PrunerError(f"--device_map {self.device_map!r} is not valid: give auto or leave it out")
        if not 0 <= self.seed < 2**32:
            raise PrunerError(f"--seed {self.seed} is out of range: give 0 to 4294967295")
        check_at_least(self, 0, "self_examples", "max_windows", *RANGES)
        check_at_least(self, 1, "refit_tokens")
        if self.refit_minutes is not None and not 0 < self.refit_minutes < float("inf"):
            raise PrunerError(f"--refit_minutes {self.refit_minutes} is out of range: give minutes above 0")
        check_at_least(self, 1, "num_examples", "iterative_steps", "round_to", "tensor_parallel", "layer")
        check_at_least(self, 1, "search_generations")
        check_at_least(self, 1, "budget_batch", "budget_tokens", "depth_examples", "experts_per_token", *SHAPE)
        check_at_least(self, 2, "max_seq_len", "calib_seq_len")
        if not 0 < self.temperature < float("inf"):
            raise PrunerError(f"--temperature {self.temperature} is out of range: give a number above 0")
        if not 0 < self.top_p <= 1:
            raise PrunerError(f"--top_p {self.top_p} is out of range: give a number above 0, and at most 1")

    def layer_numbers(self, name: str) -> list[tuple[str, int]]:
        """Split the entries of a flag such as ``4,7`` or ``encoder.4`` into stack and number.

        Raises:
            PrunerError: an entry has no number.
        """
        numbers = []
        for entry in map(str, getattr(self, name)):
            stack, _, number = entry.rpartition(".")
            if not number.isdecimal() or not number.isascii():
                raise PrunerError(f"--{name} {entry!r} is not valid: give numbers, such as 4,7 or encoder.4")
            numbers.append((stack, int(number)))
        return numbers


@dataclass(kw_only=True)
class HfPruneArguments(PruneArguments):
    """Flags of ``hf_prune.py``: those of ``llm-pruner prune``, with LLM-Pruner's defaults."""

    preset: Preset = flag(
        "paper",
        "defaults of the other flags (fast: best on less text, in a third of the time; paper: as in LLM-Pruner)",
        group="method",
    )

    @property
    def saves_checkpoint(self) -> bool:
        """True if the run leaves a checkpoint: as in LLM-Pruner, only if a flag asks for it."""
        return not self.no_save and (self.save_model or self.output is not None)

    def check(self) -> None:
        """Refuse what cannot work, as the base class does, and flags that need a checkpoint where none is saved."""
        super().check()
        check_combinations(self, (), REQUIRES_SAVING)
