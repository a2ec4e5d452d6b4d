"""Compensation: losses that a linear map can undo are undone, and others become smaller."""

import pytest
import torch
from helpers.architectures import perturbed, tiny_config, tiny_model
from helpers.models import build, pruned_by, tokens
from transformers import AutoModelForCausalLM

import llm_pruner as lp
from llm_pruner.models.hooks import forward_hooks
from llm_pruner.models.inputs import example_inputs
from llm_pruner.models.running import relative_difference
from llm_pruner.refit.added import added_projections, single_stack
from llm_pruner.refit.biases import with_biases
from llm_pruner.refit.budget import Budget
from llm_pruner.refit.compensate import _refit_layer, walk_original
from llm_pruner.refit.matching import matching_stacks
from llm_pruner.refit.reconstruct import reconstruct
from llm_pruner.refit.regression import RegressionSums
from llm_pruner.refit.stream import ResidualStream
from llm_pruner.selection.plan import PruningPlan

ADDED = [("self_attn.o_proj", False), ("mlp.down_proj", False)]


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def halved(model, kinds=("neurons",), seed=0):
    return pruned_by(model, seed=seed, kinds=kinds)[1]


@pytest.mark.parametrize("family", ("llama_grouped", "gpt2", "opt", "phi3", "gpt_neox"))
def test_unseen_tokens_come_closer_to_the_original(family):
    model = build(family)
    pruned = halved(model)
    ids, unseen = tokens(64, 16), tokens(16, 16, seed=9)
    before = torch.nn.functional.mse_loss(logits(pruned, unseen), logits(model, unseen))
    weights = {n: p.clone() for n, p in model.named_parameters()}
    report = lp.compensate(model, pruned, ids)
    after = torch.nn.functional.mse_loss(logits(pruned, unseen), logits(model, unseen))
    assert after < 0.9 * before
    assert [r.module.split(".")[-1] for r in report.layers] and all(r.after <= r.before for r in report.layers)
    assert any(r.ridge is not None for r in report.layers)
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters()), "the original has changed"


@pytest.mark.parametrize("family", ("gemma2", "gemma3_text", "olmo2", "glm4"))
def test_layers_that_normalize_outputs_before_they_add_them(family):
    model = tiny_model(family)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.ndim > 1 else 1)
    pruned = halved(model)
    added = added_projections(pruned, tokens(1, 16))
    assert all([(one.name, one.norm_reads_sum) for one in layer] == ADDED for layer in added)
    unseen = tokens(16, 16, seed=9)
    before = torch.nn.functional.mse_loss(logits(pruned, unseen), logits(model, unseen))
    report = lp.compensate(model, pruned, tokens(128, 16))
    assert len(report.layers) == 2 * len(added)
    assert torch.nn.functional.mse_loss(logits(pruned, unseen), logits(model, unseen)) < 0.9 * before


@pytest.mark.parametrize("family", ("gemma2", "gemma3_text", "olmo2", "glm4"))
def test_what_a_norm_adds_is_linear_in_the_scaled_inputs(family):
    """With the norm's divisor as it is: the gain times the weight times the inputs, divided as the output is."""
    model, ids = tiny_model(family), tokens(8, 16)
    _, layers = single_stack(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter) if parameter.ndim == 1 else 0)
        stream = ResidualStream(model.eval(), layers, [ids])
        for i, added in enumerate(added_projections(model, ids)):
            normed = {}

            def keep(name, normed=normed):
                return lambda _, __, output: None if name in normed else normed.update({name: output})

            with forward_hooks([(layers[i].get_submodule(one.norm), keep(one.name)) for one in added]):
                reads, _ = stream.run_noting(i, 0, added)
            for one in added:
                module = layers[i].get_submodule(one.name)
                weight = module.weight if module.bias is None else torch.cat([module.weight, module.bias[:, None]], 1)
                found = stream.factors(i, one) * (reads[one.name] @ weight.T)
                torch.testing.assert_close(found, normed[one.name], rtol=1e-4, atol=1e-5)
            stream.advance(i, [])


def test_norms_of_16_bits_are_read_while_their_layer_runs():
    model = tiny_model("gemma3_text").to(torch.bfloat16)
    report = lp.compensate(model, halved(model), tokens(64, 16))
    assert all(refit.after <= refit.before for refit in report.layers)
    assert report.layers[-1].after < 0.95 * report.layers[-1].before


@pytest.mark.parametrize("family", ("gemma3_text", "olmo2"))
def test_a_projection_behind_which_a_norm_stands_makes_up_for_a_dropped_layer(family):
    model = tiny_model(family)
    graph = lp.trace(model)
    (layers,) = graph.of_kind("layers")
    plan = PruningPlan()
    plan.keep(layers, torch.arange(layers.size - 1), graph.shapes)
    pruned, unseen = lp.apply(model, plan), tokens(16, 16, seed=9)
    before = torch.nn.functional.mse_loss(logits(pruned, unseen), logits(model, unseen))
    (last,) = lp.compensate(model, pruned, tokens(128, 16), kept=range(layers.size - 1)).layers[-1:]
    assert last.module.endswith("down_proj") and last.after < 0.9 * last.before
    assert torch.nn.functional.mse_loss(logits(pruned, unseen), logits(model, unseen)) < 0.9 * before


def test_a_regression_sees_what_a_gain_leaves_of_its_weight():
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(200, 6, generator=draw), torch.randn(6, 4, generator=draw)
    gain = torch.tensor([2.0, 0.5, -1.0, 1e-9])  # the last channel's error does not depend on the weight
    error = (x @ weight) * gain
    sums = RegressionSums(1.0, gain)
    sums.add(x, error, torch.zeros_like(error))
    change = sums.solve(1e-6)
    torch.testing.assert_close(change[:, :3], weight[:, :3], rtol=1e-3, atol=1e-3)
    assert (change[:, 3] == 0).all()
    assert sums.gain(change) == pytest.approx(sums.error, rel=1e-4)
    some = torch.tensor([0, 2])
    assert sums.restricted(torch.arange(6), weight).error == pytest.approx(0, abs=1e-2 * sums.error)
    assert sums.restricted(some, 0 * weight[some]).error == pytest.approx(sums.error)


def granite():
    """Its layers multiply what they add to the stream."""
    config = tiny_config("granite")
    config.residual_multiplier = 0.22
    return perturbed(AutoModelForCausalLM, config)


def test_layers_that_multiply_what_they_add():
    model = granite()
    pruned, unseen = halved(model), tokens(16, 16, seed=9)
    for added in added_projections(pruned, tokens(1, 16)):
        assert [one.name for one in added] == [name for name, _ in ADDED]
        assert [one.factor for one in added] == pytest.approx([0.22, 0.22], rel=1e-3)
    before = torch.nn.functional.mse_loss(logits(pruned, unseen), logits(model, unseen))
    lp.compensate(model, pruned, tokens(128, 16))
    assert torch.nn.functional.mse_loss(logits(pruned, unseen), logits(model, unseen)) < 0.95 * before


def test_each_projection_is_refitted_once():
    """Conformer's layers add half of their first MLP, which the next two norms read."""
    model = tiny_model("wav2vec2-conformer:audio-classification")
    for added in added_projections(model, example_inputs(model), model.wav2vec2_conformer.encoder.layers):
        assert [one.name for one in added] == ["ffn1.output_dense", "self_attn.linear_out", "ffn2.output_dense"]
        assert [one.factor for one in added] == pytest.approx([0.5, 1, 0.5])


def test_layers_may_widen_the_stream():
    """A stage of Swin ends with twice the channels."""
    model = tiny_model("swin:image-classification")
    report = lp.compensate(model, halved(model), example_inputs(model, rows=64))
    assert report.layers and all(refit.after <= refit.before for refit in report.layers)


def test_layers_that_do_not_run_one_by_one_are_refused():
    """GPT-1's return lists; Reformer's read two streams."""
    assert all(len(added) == 2 for added in added_projections(tiny_model("openai-gpt"), tokens(1, 16)))
    model = tiny_model("reformer")
    with pytest.raises(lp.PrunerError, match="cannot be compensated: its layers do not run one by one: TypeError"):
        lp.compensate(model, halved(model), tokens(64, 16))


@pytest.mark.parametrize(
    "name", ("mistral:question-answering", "falcon:question-answering", "gemma3:text-classification")
)
def test_layers_of_a_class_that_always_caches_run_without_a_cache(name):
    model = tiny_model(name)
    report = lp.compensate(model, halved(model), tokens(64, 16))
    assert report.layers and all(refit.after <= refit.before for refit in report.layers)


@pytest.mark.parametrize("family", ("llama_grouped", "gpt2", "gpt_neox", "mixtral", "granite"))
def test_the_stream_is_moved_as_running_the_layer_again_would(family):
    model = granite() if family == "granite" else tiny_model(family) if family == "mixtral" else build(family)
    pruned, batches = halved(model), list(tokens(64, 16).split(8))
    lp.compensate(model, pruned, torch.cat(batches), "least_squares")
    _, layers = single_stack(pruned)
    added = added_projections(pruned, batches[0])
    with torch.no_grad():
        before = ResidualStream(model.eval(), single_stack(model)[1], batches)
        moved, again = (ResidualStream(pruned.eval(), layers, batches) for _ in range(2))
        (stack,) = matching_stacks(model, pruned)
        _, targets = next(walk_original(before, stack, added))
        _refit_layer(pruned, moved, 0, targets, added[0], only_bias=False)
        again.advance(0, [])
    for ours, theirs in zip(moved.hidden, again.hidden, strict=True):
        assert relative_difference(ours, theirs) < 1e-5


def test_arguments_of_layers_that_depend_on_the_stream_are_noticed():
    """Layers do not run while their arguments are recorded, unless one returns more than the stream."""

    class Scaled(type(build("llama").model)):
        def forward(self, *args, **kwargs):
            noted = []

            def scale(_, args, kwargs):
                return args, kwargs | {"position_embeddings": [noted[0] * e for e in kwargs["position_embeddings"]]}

            first, second = self.layers[:2]
            note = [(first, lambda _, __, output: noted.append(output.mean()))]
            with forward_hooks(note), forward_hooks(before=[(second, scale)], with_kwargs=True):
                return super().forward(*args, **kwargs)

    model = build("llama")
    model.model.__class__ = Scaled
    with pytest.raises(lp.PrunerError, match="more than one stream"):
        ResidualStream(model, single_stack(model)[1], [tokens(8, 16)])


def test_twins_stand_in_for_each_other():
    """One of two identical neurons can be removed without error: the refit lets the other give the output of both."""
    model = build("llama")
    plan, graph = PruningPlan(), lp.trace(model)
    with torch.no_grad():
        for layer in model.model.layers:
            for projection in (layer.mlp.gate_proj, layer.mlp.up_proj):
                projection.weight[1::2] = projection.weight[::2]
    for unit in graph.of_kind("neurons"):
        plan.keep(unit, torch.arange(0, 48, 2), graph.shapes)
    pruned = lp.apply(model, plan)
    unseen = tokens(8, 16, seed=9)
    before = relative_difference(logits(pruned, unseen), logits(model, unseen))
    lp.compensate(model, pruned, tokens(128, 16))
    after = relative_difference(logits(pruned, unseen), logits(model, unseen))
    assert before > 0.05
    assert after < 0.01


def test_a_model_that_lost_nothing_is_left_alone():
    model = build("llama")
    twin = build("llama")
    report = lp.compensate(model, twin, tokens(32, 16))
    assert {r.ridge for r in report.layers} == {None}
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters()))


def test_heads_with_slopes_of_their_own():
    model = tiny_model("bloom")
    pruned = halved(model, kinds=("heads", "neurons"))
    unseen = tokens(16, 16, seed=9)
    before = torch.nn.functional.mse_loss(logits(pruned, unseen), logits(model, unseen))
    lp.compensate(model, pruned, tokens(64, 16))
    assert torch.nn.functional.mse_loss(logits(pruned, unseen), logits(model, unseen)) < before


def test_models_that_cannot_be_compensated_are_refused():
    model = build("llama")
    with pytest.raises(lp.PrunerError, match="at least 32 calibration samples"):
        lp.compensate(model, halved(model), tokens(8, 16))
    with pytest.raises(lp.PrunerError, match="narrower"):
        lp.compensate(model, halved(model, kinds=("hidden",)), tokens(32, 16))
    with pytest.raises(lp.PrunerError, match="other stacks of layers"):
        lp.compensate(tiny_model("t5:seq2seq"), model, tokens(32, 16))


def test_weights_of_16_bits():
    """They are computed with in float32 here, and stay what they are."""
    model = build("llama").to(torch.bfloat16)
    pruned = halved(model)
    ids, unseen = tokens(64, 16), tokens(16, 16, seed=9)
    before = torch.nn.functional.mse_loss(logits(pruned, unseen).float(), logits(model, unseen).float())
    lp.compensate(model, pruned, ids)
    after = torch.nn.functional.mse_loss(logits(pruned, unseen).float(), logits(model, unseen).float())
    assert after < 0.95 * before
    assert {p.dtype for p in pruned.parameters()} == {torch.bfloat16}


def test_logits_are_scaled_by_the_factor_that_brings_them_closest():
    """A pruned model whose only fault is a head twice as loud gets it back."""
    model = build("llama")
    loud = build("llama")
    with torch.no_grad():
        loud.lm_head.weight.mul_(1.25)
    report = lp.compensate(model, loud, tokens(32, 16))
    assert report.temperature == pytest.approx(0.8, abs=0.021)
    assert torch.allclose(logits(loud, tokens(2, 8)), logits(model, tokens(2, 8)), rtol=0.05, atol=0.05)


def test_a_failure_while_scaling_is_tried_changes_no_weight():
    """Half of the last norm is tried on a stand-in: memory may run out in that very pass."""
    model, pruned = build("llama"), build("llama")
    before = {name: tensor.clone() for name, tensor in pruned.state_dict().items()}

    def run_out(module, args):
        if not torch.equal(module.weight, before["model.norm.weight"]):
            raise torch.OutOfMemoryError("out of memory")

    pruned.model.norm.register_forward_pre_hook(run_out)
    with pytest.raises(torch.OutOfMemoryError):
        lp.compensate(model, pruned, tokens(32, 16))
    assert all(torch.equal(tensor, before[name]) for name, tensor in pruned.state_dict().items())


@pytest.mark.parametrize("family", ("llama_grouped", "gpt_neox", "opt"))
def test_biases_alone(family, tmp_path):
    """The mean of what is lost is put back, and nothing but biases changes; the checkpoint loads again."""
    model = build(family)
    with torch.no_grad():  # neurons that say something on average
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "up_proj.weight")):
                parameter.add_(0.05)
    pruned = halved(model)
    ids, unseen = tokens(64, 16), tokens(16, 16, seed=9)
    roomy = with_biases(pruned, ids)
    assert torch.allclose(logits(roomy, unseen), logits(pruned, unseen), atol=1e-6)
    assert (roomy is pruned) == (family != "llama_grouped")
    biases = {n: p.clone() for n, p in roomy.named_parameters()}
    lost = torch.nn.functional.mse_loss(logits(roomy, unseen), logits(model, unseen))
    lp.compensate(model, roomy, ids, "bias")
    moved = {n for n, p in roomy.named_parameters() if not torch.equal(p, biases[n]) and ".layers." in n}
    assert moved and all(n.endswith(".bias") for n in moved)
    assert torch.nn.functional.mse_loss(logits(roomy, unseen), logits(model, unseen)) < 0.98 * lost
    lp.save(roomy, None, tmp_path / "m")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert torch.allclose(logits(again, unseen), logits(roomy, unseen), atol=1e-5)


def test_per_layer_widths_get_biases_too(tmp_path):
    model = build("llama_grouped")
    graph = lp.trace(model)
    plan = lp.select(graph, lp.score(model, graph, criterion="random"), kinds=("neurons",), layers=[1])
    pruned = lp.apply(model, plan)
    roomy = with_biases(pruned, tokens(32, 16))
    assert roomy.model.layers[0].mlp.down_proj.bias is not None
    assert torch.allclose(logits(roomy, tokens(2, 16)), logits(pruned, tokens(2, 16)), atol=1e-6)
    lp.compensate(model, roomy, tokens(32, 16), "bias")
    lp.save(roomy, None, tmp_path / "m")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert torch.allclose(logits(again, tokens(2, 16)), logits(roomy, tokens(2, 16)), atol=1e-5)


def test_models_without_a_field_for_biases_are_refused():
    with pytest.raises(lp.PrunerError, match="by least_squares"):
        with_biases(tiny_model("mistral"), tokens(1, 16))
    model = tiny_model("mistral")
    with pytest.raises(lp.PrunerError, match="has a bias"):
        lp.compensate(model, halved(model), tokens(32, 16), "bias")
    with pytest.raises(lp.PrunerError, match="choose from least_squares, bias"):
        lp.compensate(model, model, tokens(32, 16), "biases")


@pytest.mark.parametrize("family", ("llama_grouped", "gpt2", "mixtral"))
def test_hidden_states_on_disk_give_the_same_models(family, monkeypatch):
    model = build(family)
    ids = tokens(32, 16)
    in_memory, on_disk = halved(model), halved(model)
    lp.compensate(model, in_memory, ids)
    reconstruct(model, in_memory, ids, Budget(tokens=2048))
    monkeypatch.setattr("llm_pruner.refit.stream.IN_MEMORY", 0)
    monkeypatch.setattr("llm_pruner.refit.experts.AT_ONCE", 50)
    lp.compensate(model, on_disk, ids)
    reconstruct(model, on_disk, ids, Budget(tokens=2048))
    assert relative_difference(logits(on_disk, ids), logits(in_memory, ids)) < 1e-4
