"""Settings of a pruning run, resolved once from its flags and preset, and frozen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..choices import CLOSED_FORM, SHAPE
from ..errors import PrunerError
from ..files import read_json
from ..importance.criteria import check_criterion
from ..models.dispatch import resolve_device
from ..refit.allocation import MIN_SAMPLES as MIN_SEARCHED
from ..refit.compensate import MIN_SAMPLES
from ..selection.budgets import COUNTS, UNITS, read_target
from ..selection.per_kind import PerKind
from .arguments import PruneArguments
from .combinations import TARGETS, check_ungrouped, read_shares
from .expert_settings import ExpertSettings, expert_settings, scopes
from .presets import PRESETS
from .refit_settings import RefitSettings, refit_settings

# Fields of a config file that describe the file, not the model's shape.
NO_SHAPE = ("architectures", "transformers_version", "_name_or_path", "dtype", "torch_dtype", "auto_map")
DEFAULT_LAYERS_KEPT = 12


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Model to prune and where it lives; with ``offload`` its weights stay mapped in their files.

    Attributes:
        narrow: multiply matrices in bfloat16 for calibration, where the device is faster at that.
    """

    name: str
    dtype: str = "auto"
    narrow: bool = False
    device: str = "cpu"
    device_map: str | None = None
    offload: bool = False
    trust_remote_code: bool = False
    task: str | None = None


@dataclass(frozen=True, kw_only=True)
class ScoringSettings:
    """Settings of scoring (:func:`llm_pruner.score`)."""

    criterion: str
    taylor: str
    aggregation: str
    seed: int
    cache: Path | None = None


@dataclass(frozen=True, kw_only=True)
class CalibrationSettings:
    """Calibration set: ``samples`` of ``tokens`` from a text.

    Attributes:
        replaceable: use another text if this one is not available (:func:`available_text`).
        fewer_samples: accept fewer samples where the text is short.
        shorter_samples: accept samples cut to the model's context length.
        packed: join documents and cut samples side by side.
        bos: begin every sample with the tokens that the tokenizer puts before a text.
        towers: parts of a model that reads more than text; others than ``language`` take images or sounds.
    """

    dataset: str
    samples: int
    tokens: int
    seed: int | None = None
    replaceable: bool = False
    fewer_samples: bool = False
    shorter_samples: bool = False
    packed: bool = False
    bos: bool = True
    towers: str = "language"


@dataclass(frozen=True, kw_only=True)
class LayerSettings:
    """Whole layers and blocks to remove.

    Attributes:
        first: keep only so many first layers.
        drop: layers to drop, as (stack, index).
        keep: layer counts to keep, as (stack, count).
        drop_attention: layers whose attention goes, as (stack, index).
        drop_mlp: layers whose MLP goes.
        keep_attention: numbers of layers that keep their attention, as (stack, count).
        keep_mlp: numbers of layers that keep their MLP.
        criterion: that chooses layers, and those that lose a block.
        replaceable: use another criterion for a model without the loss that this one compares.
        samples: calibration samples for it.
    """

    first: int | None = None
    drop: tuple[tuple[str, int], ...] = ()
    keep: tuple[tuple[str, int], ...] = ()
    drop_attention: tuple[tuple[str, int], ...] = ()
    drop_mlp: tuple[tuple[str, int], ...] = ()
    keep_attention: tuple[tuple[str, int], ...] = ()
    keep_mlp: tuple[tuple[str, int], ...] = ()
    criterion: str = "loss"
    replaceable: bool = False
    samples: int = 16

    @property
    def any(self) -> bool:
        named = self.first or self.drop or self.drop_attention or self.drop_mlp
        return bool(named or self.keep or self.keep_attention or self.keep_mlp)


@dataclass(frozen=True, kw_only=True)
class WidthSettings:
    """Settings of width pruning: units, amount and ranking (:func:`llm_pruner.select`).

    Attributes:
        kinds: kinds of units; empty: the preset's.
        ranges: first and last layer (not included) by kind; None: the preset's.
        ratio: share of a unit's indices to remove if there is no budget.
        proportions: proportions of kinds under a budget; 0 if they are to be measured.
        uniform: keep the same number of indices in every layer, so that the result is a plain checkpoint.
        generations: generations of a search for widths; None: widths follow from scores.
    """

    preset: str
    kinds: tuple[str, ...] = ()
    ranges: Mapping[str, tuple[int | None, int | None]] = field(default_factory=dict)
    ratio: float = 0.5
    proportions: Mapping[str, float] = field(default_factory=dict)
    iterative_steps: int = 1
    scope: PerKind = "local"
    normalize: PerKind = "none"
    floor: float = 0.0
    round_to: int = 1
    tensor_parallel: int = 1
    align: bool = False
    uniform: bool = False
    generations: int | None = None


@dataclass(frozen=True, kw_only=True)
class BudgetSettings:
    """Budget of the pruned model; ``kind`` is the name of a ``--target_*`` flag."""

    kind: str
    target: str
    tokens: int = 2048
    batch: int = 1


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """Measurements before and after pruning; ``bos`` as in :class:`CalibrationSettings`."""

    datasets: tuple[str, ...] = ()
    tokens: int = 128
    bos: bool = True
    max_windows: int | None = None
    device: str = "cpu"
    generate_before: bool = False
    generate_after: bool = False
    temperature: float = 1.0
    top_p: float = 0.95


@dataclass(frozen=True, kw_only=True)
class OutputSettings:
    """Output of a run: folder, and whether to save a checkpoint; ``named``: the user named the folder.

    With ``dequantize``, a quantized checkpoint is written in 16 bits. The folder ``unfinished`` holds what a run that
    was stopped leaves to the next, unless that is ``fresh``.
    """

    folder: Path
    named: bool = False
    save: bool = False
    standalone: bool = False
    push_to_hub: str | None = None
    dequantize: bool = False
    fresh: bool = False
    unfinished: Path | None = None


@dataclass(frozen=True, kw_only=True)
class PruneSettings:
    """Settings of a pruning run, by concern."""

    preset: str
    seed: int
    model: ModelSettings
    scoring: ScoringSettings
    calibration: CalibrationSettings
    layers: LayerSettings
    widths: WidthSettings
    experts: ExpertSettings
    shape: Mapping[str, Any]
    budget: BudgetSettings | None
    refit: RefitSettings
    evaluation: EvaluationSettings
    output: OutputSettings

    @property
    def prunes_widths(self) -> bool:
        """Return True unless only whole layers or blocks are removed, or tokens are sent to fewer experts."""
        if self.widths.kinds:
            return self.widths.kinds != ("layers",)
        return not (self.layers.any or self.experts.per_token) or bool(self.budget or self.shape)


def resolve_settings(arguments: PruneArguments) -> PruneSettings:
    """Check flags, fill in the preset and resolve devices.

    Raises:
        PrunerError: flags exclude or need each other, a value is not valid, a criterion or device does not exist, or
            the file of ``--target_config`` cannot be read.
    """
    arguments.check()
    value = filled_arguments(arguments)
    check_ungrouped(arguments, value["refit"])
    settings = PruneSettings(
        preset=arguments.preset,
        seed=arguments.seed,
        model=_model_settings(arguments),
        scoring=ScoringSettings(
            criterion=check_criterion(value["pruner_type"]),
            taylor=value["taylor"],
            aggregation=value["grouping_strategy"],
            seed=arguments.seed,
            cache=Path(arguments.score_cache) if arguments.score_cache else None,
        ),
        calibration=CalibrationSettings(
            dataset=value["calib_dataset"],
            replaceable=arguments.calib_dataset is None,
            samples=_sample_count(arguments, value),
            tokens=value["calib_seq_len"],
            seed=arguments.calib_seed,
            fewer_samples=arguments.num_examples is None and arguments.calib_tokens is None,
            shorter_samples=arguments.calib_seq_len is None,
            packed=arguments.calib_packing,
            bos=value["bos"],
            towers=arguments.towers,
        ),
        layers=_layer_settings(arguments),
        widths=_width_settings(arguments, bool(value["hardware_align"])),
        experts=expert_settings(arguments),
        shape=_shape(arguments),
        budget=_budget_settings(arguments),
        refit=refit_settings(arguments, value),
        evaluation=_evaluation_settings(arguments, value["bos"]),
        output=_output_settings(arguments),
    )
    samples = settings.calibration.samples
    if settings.widths.generations is not None and samples < MIN_SEARCHED:
        raise PrunerError(
            f"--allocate search needs --num_examples of at least {MIN_SEARCHED}, better 128, not {samples}"
        )
    if settings.refit.needs_text and samples < MIN_SAMPLES:
        flag = "refit" if arguments.compensate is None else "compensate"
        raise PrunerError(
            f"--{flag} {value[flag]} needs --num_examples of at least {MIN_SAMPLES}, better 128, not {samples}: "
            f"give more, or --{flag} none"
        )
    return settings


def filled_arguments(arguments: PruneArguments) -> dict[str, Any]:
    """Return all flags by name, with the preset's values for flags not given, and ``save_model`` as resolved."""
    preset = PRESETS[arguments.preset]
    flags = asdict(arguments) | {"save_model": arguments.saves_checkpoint}
    if arguments.compensate is not None:
        flags["refit"] = next((new for new, old in CLOSED_FORM.items() if old == arguments.compensate), "none")
    return {name: preset.get(name) if value is None else value for name, value in flags.items()}


def _sample_count(arguments: PruneArguments, value: Mapping[str, Any]) -> int:
    if arguments.calib_tokens is None:
        return int(value["num_examples"])
    try:
        number, factor = read_target("calib_tokens", arguments.calib_tokens, COUNTS)
    except PrunerError:
        factor = None
    if factor is None:
        raise PrunerError(f"--calib_tokens {arguments.calib_tokens!r} is not valid: give an amount such as 1M")
    return max(1, round(number * factor) // int(value["calib_seq_len"]))


def _model_settings(arguments: PruneArguments) -> ModelSettings:
    return ModelSettings(
        name=arguments.model,
        dtype=arguments.dtype,
        narrow=arguments.dtype == "auto" and arguments.preset != "paper",
        device=resolve_device(arguments.device, "--device"),
        device_map=arguments.device_map,
        offload=arguments.stream,
        trust_remote_code=arguments.trust_remote_code,
        task=arguments.task,
    )


def _evaluation_settings(arguments: PruneArguments, bos: bool) -> EvaluationSettings:
    return EvaluationSettings(
        datasets=tuple(arguments.eval_datasets),
        tokens=arguments.max_seq_len,
        bos=bos,
        max_windows=arguments.max_windows or None,
        device=resolve_device(arguments.eval_device, "--eval_device"),
        generate_before=arguments.test_before_train,
        generate_after=arguments.test_after_train,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
    )


def _output_settings(arguments: PruneArguments) -> OutputSettings:
    return OutputSettings(
        folder=Path(arguments.output or Path(arguments.output_root) / arguments.save_ckpt_log_name),
        named=arguments.output is not None,
        save=arguments.saves_checkpoint,
        standalone=arguments.standalone,
        push_to_hub=arguments.push_to_hub,
        dequantize=arguments.dequantize,
        fresh=arguments.fresh,
    )


def _layer_settings(arguments: PruneArguments) -> LayerSettings:
    first = (arguments.layer or DEFAULT_LAYERS_KEPT) if arguments.layer_wise else None
    return LayerSettings(
        first=first,
        drop=tuple(arguments.layer_numbers("drop_layers")),
        keep=tuple(arguments.layer_numbers("num_layers")),
        drop_attention=tuple(arguments.layer_numbers("drop_attention")),
        drop_mlp=tuple(arguments.layer_numbers("drop_mlp")),
        keep_attention=tuple(arguments.layer_numbers("num_attention")),
        keep_mlp=tuple(arguments.layer_numbers("num_mlp")),
        criterion="last" if first else arguments.depth or "loss",
        replaceable=arguments.depth is None,
        samples=arguments.depth_examples,
    )


def _width_settings(arguments: PruneArguments, align: bool) -> WidthSettings:
    attention, mlp = (
        (getattr(arguments, f"block_{block}_layer_start"), getattr(arguments, f"block_{block}_layer_end"))
        for block in ("attention", "mlp")
    )
    kinds: tuple[str, ...] = tuple(arguments.kinds)
    if arguments.channel_wise:
        kinds = ("hidden",)
    elif not kinds and (arguments.block_wise or attention != (None, None)):
        kinds = ("heads", "neurons")
    proportions: Mapping[str, float] = read_shares(arguments.shares)
    if "layers" in kinds and any(map(arguments.is_given, TARGETS)):
        proportions = dict.fromkeys(kinds, 1.0)
    scope, normalize = scopes(arguments)
    return WidthSettings(
        preset=arguments.preset,
        kinds=kinds,
        ranges={"heads": attention, "query_heads": attention, "neurons": mlp, "channels": mlp, "experts": mlp},
        ratio=arguments.pruning_ratio,
        proportions=proportions,
        iterative_steps=arguments.iterative_steps,
        scope=scope,
        normalize=normalize,
        floor=arguments.floor,
        round_to=arguments.round_to,
        tensor_parallel=arguments.tensor_parallel,
        align=align,
        uniform=arguments.uniform,
        generations=arguments.search_generations if arguments.allocate == "search" else None,
    )


def _budget_settings(arguments: PruneArguments) -> BudgetSettings | None:
    for kind in TARGETS:
        if (target := getattr(arguments, kind)) is not None:
            read_target(kind, target, UNITS[kind])
            return BudgetSettings(
                kind=kind, target=str(target), tokens=arguments.budget_tokens, batch=arguments.budget_batch
            )
    return None


def _shape(arguments: PruneArguments) -> dict[str, Any]:
    """Return the config fields that the result must have."""
    shape: dict[str, Any] = {}
    if arguments.target_config:
        content = read_json(arguments.target_config)
        if not isinstance(content, dict) or not content:
            raise PrunerError(f"--target_config {arguments.target_config} holds no config: give an object of fields")
        shape = {name: value for name, value in content.items() if name not in NO_SHAPE}
    named = {name: getattr(arguments, name) for name in SHAPE}
    return shape | {name: value for name, value in named.items() if value is not None}
