"""Apply a plan: slice the weights, rebuild the model from a config, check that both agree."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import PrunerError
from ..graph.tracer import TraceError
from ..graph.units import CouplingGraph, Unit, share_graph, trace
from ..logs import log
from ..media import trace_media
from ..models.inputs import example_inputs, share_inputs
from ..models.running import MetaReads, model_inputs, stored_tensors, tracing_mode
from ..models.skeleton import canonical_names, shapes_of, skeleton
from ..models.towers import reach_towers, tower_paths
from ..selection.plan import PruningPlan, name_after
from .config.shape import target_config
from .config.solver import solve
from .config.token_ids import renumber
from .equivalence import MASKABLE, compare_logits, masking_modes
from .per_token import with_plan_routing, without_balancing_loss
from .rebuild import build_from_state
from .same_axes import find_wrong_axis
from .slicing import check_fits, cut

TOWERS = "towers"  # setting of plans that cut other towers than the language
TASK = "task"  # setting of plans for the class of a task, where the checkpoint declares another
ALIGNMENT = "alignment_heads"  # of generation configs: layers and heads that tell the times of words
Place = Callable[[torch.Tensor], torch.Tensor]


def task_of_plan(plan: PruningPlan) -> str | None:
    """Return the task that the run of a plan loaded the class of, None where it loaded the declared class."""
    task = plan.settings.get(TASK)
    return task if isinstance(task, str) else None


def in_memory(tensor: torch.Tensor) -> torch.Tensor:
    """Leave a tensor where it is; the default place."""
    return tensor


def apply(
    model: PreTrainedModel, plan: PruningPlan, place: Place = in_memory, config: PreTrainedConfig | None = None
) -> PreTrainedModel:
    """Return a new, smaller model of the same class; the original is untouched.

    The new model is built from a config, so that every attribute is right by construction, and traced: its units must
    be the original's at the plan's sizes. Weights keep dtype and device. If the run that made the plan refitted its
    model, the refit is not repeated (:func:`llm_pruner.compensate`).

    Args:
        model: original model, with weights or on the meta device.
        plan: plan made for this model, from :func:`llm_pruner.select` or a file.
        place: function that moves each new tensor to its final memory and returns it
            (:func:`llm_pruner.checkpoint.on_disk.on_disk` moves it to a file, for models larger than memory).
        config: config of the new model, instead of a search for one. Constants that an architecture derives from sizes,
            such as the factor on Gemma's embeddings, then follow this config and may differ from the original's. A plan
            that was made for a shape (``settings["shape"]``) has a config of its own.

    Returns:
        The pruned model, in eval mode.

    Raises:
        PrunerError: the plan is for another model, no config expresses what it leaves, or it cuts a tower of images or
            sounds of a model whose checkpoint has no processor (call ``lp.trace(model, inputs=…)`` first).

    Example:
        >>> import llm_pruner as lp
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        ...                      num_attention_heads=2)
        >>> model = LlamaForCausalLM(config).eval()
        >>> graph = lp.trace(model)
        >>> plan = lp.select(graph, lp.score(model, graph, criterion="l2"), ratio=0.25, kinds=("neurons",))
        >>> lp.apply(model, plan).model.layers[0].mlp.down_proj.weight.shape
        torch.Size([16, 24])
    """
    check_fits(shapes_of(model), plan)
    model = with_plan_routing(model, plan)
    if config is None and isinstance(shape := plan.settings.get("shape"), dict):
        config = target_config(model, shape)
    graph = _traced_for(model, plan)
    problems: list[str] = []
    configs = solve(model, plan, graph) if config is None else iter([config])
    for solved in configs:
        found = without_balancing_loss(solved, plan, graph)
        try:
            # Looked at on the meta device, before any weight is copied, unless the model needs them to run.
            rebuilt = skeleton(type(model), found) if graph.on_meta else _fill(model, plan, found, place)
            share_inputs(rebuilt, model)
            problem = find_wrong_axis(rebuilt, graph, plan) or _broken_cache(rebuilt, model)
        except TraceError as error:
            problem = str(error)
        if not problem:
            pruned = _fill(model, plan, found, place) if graph.on_meta else rebuilt
            share_graph(pruned, rebuilt)
            share_inputs(pruned, model)
            problem = "" if config is not None else _wrong_factor(model, pruned, plan, graph)
            if not problem:
                if pruned.can_generate():
                    _fit_generation(pruned, plan)
                return pruned
            if problem in problems:  # no other config will do better
                break
        problems.append(problem)
    raise PrunerError(f"no config of {type(model.config).__name__} carries the plan: {problems[0]}")


def _fit_generation(pruned: PreTrainedModel, plan: PruningPlan) -> None:
    """Give a generation config the new ids of its tokens, and take numbers of heads that are others' now from it."""
    settings = pruned.generation_config
    if plan.tokens is not None:
        renumber(settings, plan.tokens)
    moved = any(choice.kind in ("heads", "query_heads", "layers") for choice in plan.units.values())
    if (moved or plan.blocks) and getattr(settings, ALIGNMENT, None):
        log.warning(
            "%s of the generation config name heads before pruning: left out, and times of words with them", ALIGNMENT
        )
        delattr(settings, ALIGNMENT)


def _traced_for(model: PreTrainedModel, plan: PruningPlan) -> CouplingGraph:
    """Trace a model so that it has the units of a plan: on an image or a sound too, where the plan needs them.

    Raises:
        PrunerError: the model has no such unit.
    """
    graph = trace(model)
    if plan.units.keys() - _names(graph.units) and (plan.settings.get(TOWERS) or _needs_media(model, plan, graph)):
        graph = trace_media(model)
    known = _names([*graph.units, *graph.frozen])
    if unknown := [name for name in plan.units if name not in known]:
        raise PrunerError(f"the plan was made for another model: it has no unit {unknown[0]}")
    return graph


def _needs_media(model: PreTrainedModel, plan: PruningPlan, graph: CouplingGraph) -> bool:
    """Return True if a plan cuts other towers, or what their projector writes to and a trace on text freezes."""
    projected = plan.units.keys() & _names(unit for unit in graph.frozen if unit.kind == "hidden")
    return reach_towers(model, plan.kept) or bool(projected and tower_paths(model))


def _names(units: Iterable[Unit]) -> set[str]:
    return {unit.name for unit in units}


def _wrong_factor(model: PreTrainedModel, pruned: PreTrainedModel, plan: PruningPlan, graph: CouplingGraph) -> str:
    """Return the change that the hidden size caused beside widths, "" if there is none: some models derive factors.

    No shape shows such a change, so the logits of the two models are compared if both have weights.
    """
    kinds = {choice.kind for choice in plan.units.values()}
    if "hidden" not in kinds or any(tensor.device.type == "meta" for tensor in stored_tensors(model).values()):
        return ""
    if not kinds <= MASKABLE:  # what has no masked twin is left out, and the rest must do without another factor
        rest = PruningPlan(blocks=plan.blocks)
        for name, choice in plan.units.items():
            if choice.kind in MASKABLE:
                rest.keep(graph.unit(name), choice.kept, graph.shapes)
        try:
            apply(model, rest)
        except PrunerError as error:
            return str(error)
        return ""
    half = model.dtype in (torch.float16, torch.bfloat16)
    ids = example_inputs(pruned, rows=2, tokens=16)
    modes, tolerance = masking_modes(graph, plan), 0.05 if half else 0.01
    report = compare_logits(model, pruned, plan, ids, dtype=model.dtype, tolerance=tolerance, modes=modes)
    if report.equivalent:
        return ""
    return f"it computes something from the hidden size that must not change (logits are off by {report.relative:.1e})"


def _broken_cache(rebuilt: PreTrainedModel, original: PreTrainedModel) -> str:
    """Return the error of a rebuilt model when it fills its cache, if the original can fill its own; else ""."""
    inputs = example_inputs(rebuilt)  # of the two, this one knows the inputs that the original was traced with

    def problem(model: PreTrainedModel) -> str:
        try:
            with torch.no_grad(), tracing_mode(model), MetaReads():
                model(**model_inputs(model, inputs), use_cache=True)
        except Exception as error:  # a model may fail in any way it likes
            return f"its cache does not take the new sizes: {type(error).__name__}: {error}"
        return ""

    if "use_cache" not in inspect.signature(original.forward).parameters:
        return ""
    found = problem(rebuilt)
    return found if found and not problem(skeleton(type(original), original.config)) else ""


def _fill(model: PreTrainedModel, plan: PruningPlan, config: PreTrainedConfig, place: Place) -> PreTrainedModel:
    # Tied tensors are cut once, under the name that the plan knows.
    canonical = canonical_names(model)
    tensors = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])
    done: dict[str, torch.Tensor] = {}
    state = {}
    for name in model.state_dict():
        new = name_after(name, plan)
        if new is not None:
            key = canonical[name]
            if key not in done:
                done[key] = place(cut(key, tensors[name].detach(), plan))
            state[new] = done[key]
    return build_from_state(config, state, model)
