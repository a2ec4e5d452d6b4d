"""The closed-form refit of models with several stacks of layers: encoder-decoders, two towers, images beside text."""

import pytest
import torch
from helpers.architectures import tiny_model
from helpers.media import model_of
from helpers.models import pruned_by, tokens

import llm_pruner as lp
from llm_pruner.media import media_inputs
from llm_pruner.models.inputs import example_inputs
from llm_pruner.models.running import logits
from llm_pruner.pruning.mending import compensate_plan
from llm_pruner.refit import compensate
from llm_pruner.refit.biases import with_biases
from llm_pruner.unfinished import Unfinished


def example(name):
    """A model, calibration samples and unseen ones."""
    if ":" in name:
        return tiny_model(name), tokens(96, 16), tokens(16, 16, seed=9)
    model = model_of(name)
    return model, *(example_inputs(model, rows=rows, seed=rows) for rows in (96, 16))


def error(model, pruned, unseen):
    return torch.nn.functional.mse_loss(logits(pruned, unseen), logits(model, unseen)).item()


@pytest.mark.parametrize("name", ("t5:seq2seq", "bart:seq2seq", "WhisperForConditionalGeneration", "CLIPModel"))
def test_one_stack_after_the_other(name):
    model, ids, unseen = example(name)
    _, pruned = pruned_by(model, kinds=("heads", "neurons"))
    before = error(model, pruned, unseen)
    report = lp.compensate(model, pruned, ids)
    half = "vision" if name == "CLIPModel" else "decoder"
    assert len({half in refit.module for refit in report.layers}) == 2
    assert any(refit.ridge is not None for refit in report.layers)
    assert error(model, pruned, unseen) < 0.7 * before


def test_a_refit_goes_on_in_the_stack_in_which_it_was_stopped(tmp_path, monkeypatch):
    model, ids, _ = example("bart:seq2seq")
    whole, stopped, again = (pruned_by(model, kinds=("neurons",))[1] for _ in range(3))
    expected = lp.compensate(model, whole, ids)
    original, calls = compensate._refit_layer, []

    def stopping(*args, **options):
        calls.append(1)
        if len(calls) == 4:  # the last layer of the decoder
            raise InterruptedError
        return original(*args, **options)

    monkeypatch.setattr("llm_pruner.unfinished.INTERVAL", 0.0)
    monkeypatch.setattr("llm_pruner.unfinished.SHARE", 0)
    monkeypatch.setattr(compensate, "_refit_layer", stopping)
    with pytest.raises(InterruptedError):
        compensate.compensate(model, stopped, ids, unfinished=Unfinished(tmp_path / "step"))
    assert compensate.compensate(model, again, ids, unfinished=Unfinished(tmp_path / "step")) == expected
    assert len(calls) == 5, "what was done is not done again"
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), again.parameters(), strict=True))


def test_dropped_layers_of_one_stack():
    """Their indices are those of the stack that lost them; the other is refitted as it is, or stays."""
    model, ids, unseen = example("bart:seq2seq")
    graph = lp.trace(model)
    (unit,) = (unit for unit in graph.of_kind("layers") if "decoder" in unit.name)
    plan = lp.PruningPlan()
    plan.keep(unit, torch.tensor([1]), graph.shapes)
    pruned = lp.apply(model, plan)
    before = error(model, pruned, unseen)
    report = lp.compensate(model, pruned, ids, kept=[1])
    assert {refit.module.split(".")[1] for refit in report.layers} == {"decoder"}
    assert error(model, pruned, unseen) <= before
    with pytest.raises(lp.PrunerError, match="give kept"):
        lp.compensate(model, pruned, ids)


def test_dropped_layers_of_both_stacks():
    """Each stack aims at its own gaps, in a run too."""
    model, ids, _ = example("bart:seq2seq")
    graph, plan = lp.trace(model), lp.PruningPlan()
    kept = {}
    for unit, layer in zip(graph.of_kind("layers"), (0, 1), strict=True):
        plan.keep(unit, torch.tensor([layer]), graph.shapes)
        kept[unit.name.removesuffix(".layers")] = [layer]
    expected, other, by_plan, by_run = (lp.apply(model, plan) for _ in range(4))
    report = lp.compensate(model, expected, ids, kept=kept)
    assert lp.compensate(model, other, ids, kept=[0]) != report
    assert lp.refit(model, by_plan, ids, plan=plan).compensation == report
    assert compensate_plan(model, by_run, plan, ids, method="least_squares")[1] == report
    with pytest.raises(lp.PrunerError, match="give kept"):
        lp.compensate(model, expected, ids, kept=[-1])
    with pytest.raises(lp.PrunerError, match="one stack of layers is needed, and this one has 2"):
        with_biases(by_run, ids)


def test_a_tower_that_text_does_not_reach(llava):
    """The tower stays where it lost nothing; where it was cut, images are asked for."""
    model, _ = lp.load(str(llava))
    text = tokens(64, 16)
    pruned = pruned_by(model, kinds=("neurons",))[1]
    report = lp.compensate(model, pruned, text)
    assert len(report.layers) == 4 and all("language_model" in refit.module for refit in report.layers)
    before, after = model.state_dict(), pruned.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before if "language_model" not in name)
    images = media_inputs(model, "synthetic", samples=40)
    graph = lp.trace(model, images[:1].tensors())
    plan = lp.select(graph, lp.score(model, graph, criterion="l2"), 0.5, ("neurons",))
    pruned = lp.apply(model, plan)
    with pytest.raises(lp.PrunerError, match="give images or sounds"):
        lp.compensate(model, pruned, text)
    before = error(model, pruned, images[32:])
    assert len({refit.module.split(".")[1] for refit in lp.compensate(model, pruned, images[:32]).layers}) == 2
    assert error(model, pruned, images[32:]) < before
