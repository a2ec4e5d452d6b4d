"""Scores against straight, independent computations and against LLM-Pruner's own choices."""

import json
from pathlib import Path

import pytest
import torch
from helpers.architectures import tiny_model
from helpers.models import build, tokens
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

import llm_pruner as lp
from llm_pruner.importance.aggregate import AGGREGATIONS
from llm_pruner.importance.gradients import visit_gradients
from llm_pruner.importance.layers import score_layers
from llm_pruner.importance.taylor import VARIANTS
from llm_pruner.models.blockwise import native_compute
from llm_pruner.models.hooks import forward_hooks
from llm_pruner.models.layers import hidden_in, with_hidden
from llm_pruner.models.loss import total_loss


def gradients(model, ids):
    model.zero_grad()
    cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters()}


def element(model, ids, variant):
    """The paper's formulas, weight by weight, with every gradient in memory."""
    weights = {n: p.detach() for n, p in model.named_parameters()}
    g = gradients(model, ids)
    h = {n: 0 for n in weights}
    for row in ids:
        for n, value in gradients(model, row[None]).items():
            h[n] = h[n] + value**2 / len(ids)
    model.zero_grad()
    terms = {
        "vectorize": lambda n: weights[n] * g[n],
        "param_first": lambda n: (weights[n] * g[n]).abs(),
        "param_second": lambda n: weights[n] ** 2 * h[n],
        "param_mix": lambda n: (weights[n] * g[n] - 0.5 * weights[n] ** 2 * h[n]).abs(),
    }
    return {n: terms[variant](n) for n in weights}


@pytest.mark.parametrize(
    ("variant", "aggregation"),
    [*((variant, "sum") for variant in VARIANTS), *(("param_first", how) for how in AGGREGATIONS if how != "sum")],
)
def test_taylor_is_the_papers_formula(variant, aggregation):
    model, ids = build("llama"), tokens(3, 10)
    graph = lp.trace(model)
    scores = lp.score(model, graph, ids, taylor=variant, aggregation=aggregation)
    values = element(model, ids, variant)
    path = "model.layers.1."
    combine = {
        "sum": sum,
        "mean": lambda parts: sum(parts) / len(parts),
        "max": lambda parts: torch.stack(parts).amax(0),
        "prod": lambda parts: torch.stack(parts).prod(0),
        "first": lambda parts: parts[0],
        "last": lambda parts: parts[-1],
    }[aggregation]
    for unit, slices, width in (
        ("mlp.neurons", [("mlp.gate_proj", 1), ("mlp.up_proj", 1), ("mlp.down_proj", 0)], 1),
        (
            "self_attn.heads",
            [("self_attn.q_proj", 1), ("self_attn.k_proj", 1), ("self_attn.v_proj", 1), ("self_attn.o_proj", 0)],
            8,
        ),
    ):
        channels = [values[f"{path}{name}.weight"].sum(dim).abs().double() for name, dim in slices]
        expected = combine(channels).view(-1, width).sum(1)
        torch.testing.assert_close(scores.values[path + unit], expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("kind", ["hidden", "vocabulary"])
@pytest.mark.parametrize("variant", ["param_first", "param_second", "param_mix"])
def test_units_of_the_whole_model_too(variant, kind):
    """Parameters outside the layers are counted once, whichever units are scored with them."""
    model, ids = build("llama"), tokens(3, 10)
    graph = lp.trace(model)
    (unit,) = graph.of_kind(kind)
    values = element(model, ids, variant)
    for kinds in (None, [kind]):
        scores = lp.score(model, graph, ids, taylor=variant, kinds=kinds).values[unit.name]
        for index in (0, 5, unit.size - 1):
            parts = [
                values[name].index_select(dim, positions).sum().item()
                for name, dims in unit.slices(index).items()
                for dim, positions in dims.items()
                if values[name].ndim > 1 or not any(n != name and n.startswith(name[:-6]) for n in values)
            ]
            assert scores[index].item() == pytest.approx(sum(parts), rel=1e-3)


def test_grouped_heads_collect_all_their_query_heads():
    """The score of a key-value group with aggregation sum is the sum over everything that goes with it."""
    model, ids = build("llama_grouped"), tokens(3, 10)
    graph = lp.trace(model)
    scores = lp.score(model, graph, ids, taylor="param_first")
    values = element(model, ids, "param_first")
    unit = graph.unit("model.layers.2.self_attn.heads")
    for index in range(unit.size):
        expected = sum(
            values[name].index_select(dim, positions).sum()
            for name, dims in unit.slices(index).items()
            for dim, positions in dims.items()
        )
        assert scores.values[unit.name][index].item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize(("criterion", "power"), [("l1", 1), ("l2", 2)])
def test_magnitude_has_no_root(criterion, power):
    model = build("gpt2")
    graph = lp.trace(model)
    scores = lp.score(model, graph, criterion=criterion)
    mlp = model.transformer.h[0].mlp
    expected = mlp.c_fc.weight.abs().pow(power).sum(0) + mlp.c_proj.weight.abs().pow(power).sum(1)
    torch.testing.assert_close(scores.values["transformer.h.0.mlp.neurons"], expected.detach().double())


def test_scoring_leaves_the_model_as_it_was():
    model = build("llama").train()
    model.model.embed_tokens.weight.requires_grad_(False)
    kept = torch.ones_like(model.lm_head.weight)
    model.lm_head.weight.grad = kept
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    lp.score(model, lp.trace(model), tokens(), taylor="param_mix")
    assert model.training and not model.model.embed_tokens.weight.requires_grad
    assert model.lm_head.weight.grad is kept and model.model.norm.weight.grad is None
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    assert "forward" not in vars(model.model.layers[0])


def test_the_loss_and_its_gradient_are_those_of_cross_entropy():
    model, ids = build("gemma3_text", final_logit_softcapping=5.0), tokens(3, 10)
    expected = gradients(model, ids)
    model.zero_grad()
    seen = {}
    loss = visit_gradients(model, expected, ids, lambda n, w, g: seen.update({n: g.clone()}))
    with torch.no_grad():
        logits = model(ids).logits
    assert loss == pytest.approx(cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item(), rel=1e-6)
    for name, gradient in expected.items():
        torch.testing.assert_close(seen[name], gradient, rtol=1e-3, atol=1e-6)


def test_random_scores_are_seeded():
    model = build("llama")
    graph = lp.trace(model)
    a, b, c = (lp.score(model, graph, criterion="random", seed=s).values for s in (1, 1, 2))
    assert all(torch.equal(a[n], b[n]) for n in a) and any(not torch.equal(a[n], c[n]) for n in a)


FIXTURE = json.loads((Path(__file__).parent / "fixtures" / "llm_pruner_kept.json").read_text())


@pytest.fixture(scope="module")
def pruned_by_llm_pruner():
    """The tiny Llama that LLM-Pruner was run on, rebuilt from its seeds; heads and neurons differ in scale."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**FIXTURE["config"])).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
        for layer in model.model.layers:
            mlp, attention = layer.mlp, layer.self_attn
            for weight in (mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight.T):
                weight.mul_(torch.rand(len(weight))[:, None] + 0.3)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
                heads = projection.weight.view(model.config.num_attention_heads, -1)
                heads.mul_(torch.rand(len(heads))[:, None] + 0.3)
    weights = [parameter.detach().double() for parameter in model.parameters()]
    sums = {"plain": sum(w.sum().item() for w in weights), "magnitude": sum(w.abs().sum().item() for w in weights)}
    assert sums == pytest.approx(FIXTURE["sum_of_weights"], rel=1e-6), "the seeds give other weights than they did"
    return model


@pytest.mark.parametrize("case", FIXTURE["kept"])
def test_parity_with_llm_pruner(case, pruned_by_llm_pruner):
    """The indices that LLM-Pruner kept of a tiny Llama, exactly; a case is criterion[/variant]/aggregation."""
    model, kept = pruned_by_llm_pruner, FIXTURE["kept"][case]
    *criterion, aggregation = case.split("/")
    options = {"criterion": criterion[0]} | ({"taylor": criterion[1]} if len(criterion) > 1 else {})
    graph = lp.trace(model)
    scores = lp.score(model, graph, torch.tensor(FIXTURE["calibration"]), aggregation=aggregation, **options)
    plan = lp.select(graph, scores, ratio=FIXTURE["ratio"], layers=FIXTURE["pruned_layers"])
    for group, indices in kept.items():
        kind, layer = group.split(".")
        name = f"model.layers.{layer}." + {"mlp": "mlp.neurons", "attn": "self_attn.heads"}[kind]
        assert plan.units[name].kept.tolist() == indices, group


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (None, "needs a calibration set"),
        (torch.zeros(2, 8), "LongTensor"),
        (torch.zeros(2, 1, dtype=torch.long), "LongTensor"),
        (torch.full((2, 8), 96), "another tokenizer"),
        (torch.tensor([[5, -100, 3]]), "token id -100"),
        ({"input_ids": torch.zeros(0, 8, dtype=torch.long)}, r"input_ids must be .* not torch.int64 \[0, 8\]"),
        ({"input_ids": torch.arange(8)}, r"input_ids must be .* not torch.int64 \[8\]"),
        ({"input_ids": torch.rand(2, 8)}, r"input_ids must be .* not torch.float32"),
        (torch.zeros(2, 65, dtype=torch.long), "at most 64"),
        ({"input_ids": torch.zeros(2, 8).long(), "attention_mask": torch.ones(2, 8).long().tril(6)}, "are padded"),
    ],
)
def test_unusable_calibration_is_refused(calibration, message):
    model = build("llama")
    with pytest.raises(lp.PrunerError, match=message):
        lp.score(model, lp.trace(model), calibration)


def test_bad_gradients_name_their_parameter():
    model = build("llama")
    graph = lp.trace(model)
    with torch.no_grad():
        model.lm_head.weight[3, 3] = float("nan")
    with pytest.raises(lp.PrunerError, match=r"loss is nan.*--dtype"):
        lp.score(model, graph, tokens())

    class Explode(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g * float("inf")

    model = build("llama")
    model.model.layers[2].mlp.down_proj.register_forward_hook(lambda m, i, o: Explode.apply(o))
    with pytest.raises(lp.PrunerError, match=r"model\.layers\.2\.mlp\.down_proj\.weight is not finite.*--dtype"):
        lp.score(model, graph, tokens())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("bad", [{"criterion": "l3"}, {"taylor": "third"}, {"aggregation": "median"}])
def test_unknown_names_list_the_known(bad):
    model = build("llama")
    with pytest.raises(lp.PrunerError, match="choose from"):
        lp.score(model, lp.trace(model), tokens(), **bad)


def inputs_of(model, module, ids):
    """Record the input of a module by a hook: [tokens, features]."""
    seen = []
    handle = model.get_submodule(module).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        model(ids)
    handle.remove()
    return torch.cat(seen).flatten(0, -2).double()


@pytest.mark.parametrize("family", ("llama", "gpt2", "opt"))
def test_reading_criteria_follow_their_formulas(family):
    names = {
        "llama": ("model.layers.1.mlp", "down_proj", "model.layers.1.mlp.neurons"),
        "gpt2": ("transformer.h.1.mlp", "c_proj", "transformer.h.1.mlp.neurons"),
        "opt": ("model.decoder.layers.1", "fc2", "model.decoder.layers.1.neurons"),
    }
    path, reader, unit = names[family]
    model, ids = build(family), tokens(6, 16)
    x = inputs_of(model, f"{path}.{reader}", ids)
    weight = model.get_submodule(f"{path}.{reader}").weight.detach().double()
    weight = weight.T if family == "gpt2" else weight  # [out, in]
    expected = {
        "activation": x.abs().mean(0),
        "wanda": (weight.abs() * x.norm(dim=0)).sum(0),
        "flap": x.var(0, unbiased=False) * weight.norm(dim=0) ** 2,
    }
    graph = lp.trace(model)
    for criterion, values in expected.items():
        found = lp.score(model, graph, ids, criterion, kinds=["neurons"]).values[unit]
        assert torch.allclose(found, values, rtol=1e-5), criterion


def test_heads_are_read_by_the_output_projection():
    model, ids = build("llama_grouped"), tokens(6, 16)
    x = inputs_of(model, "model.layers.0.self_attn.o_proj", ids)
    weight = model.model.layers[0].self_attn.o_proj.weight.detach().double()
    channels = (weight.abs() * x.norm(dim=0)).sum(0)
    found = lp.score(model, lp.trace(model), ids, "wanda", kinds=["heads"]).values["model.layers.0.self_attn.heads"]
    assert torch.allclose(found, channels.view(2, -1).sum(1), rtol=1e-5)  # two groups of two query heads


def test_inputs_of_all_experts_add_up():
    model, ids = build("mixtral"), tokens(6, 16)
    stack = model.model.layers[0].mlp.experts
    total = torch.zeros(48, dtype=torch.float64)
    count = 0
    with torch.no_grad():
        hidden = []
        handle = stack.register_forward_pre_hook(lambda _, args: hidden.append(args))
        model(ids)
        handle.remove()
        x, chosen, _ = hidden[0]
        for token, experts in zip(x, chosen):
            for expert in experts:
                gate, up = (stack.gate_up_proj[expert] @ token).chunk(2)
                total += (torch.nn.functional.silu(gate) * up).abs().double()
                count += 1
    found = lp.score(model, lp.trace(model), ids, "activation", kinds=["neurons"])
    assert torch.allclose(found.values["model.layers.0.mlp.experts.neurons"], total / count, rtol=1e-4)


def test_criteria_of_activations_do_not_score_layers():
    model = build("llama")
    with pytest.raises(lp.PrunerError, match="does not score"):
        lp.score(model, lp.trace(model), tokens(), "wanda", kinds=["layers"])
    assert "model.layers.layers" not in lp.score(model, lp.trace(model), tokens(), "wanda").values


@pytest.mark.parametrize("family", ("llama", "gpt2", "opt"))
def test_layers_are_scored_by_their_effect(family):
    """Block influence by hand, and a layer that does nothing has none and costs no loss."""
    model, ids = build(family), tokens(3, 16)
    stack = {"llama": "model.layers", "gpt2": "transformer.h", "opt": "model.decoder.layers"}[family]
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
        expected = 1 - torch.cosine_similarity(states[0].double(), states[1].double(), dim=-1).mean()
    graph = lp.trace(model)
    found = lp.score(model, graph, ids, "block_influence").values[f"{stack}.layers"]
    assert found[0].item() == pytest.approx(expected.item(), rel=1e-5)
    with torch.no_grad():
        for name, parameter in model.get_submodule(f"{stack}.1").named_parameters():
            if any(part in name for part in ("o_proj", "down_proj", "c_proj", "out_proj", "fc2")):
                parameter.zero_()
    influence = lp.score(model, graph, ids, "block_influence").values[f"{stack}.layers"]
    change = lp.score(model, graph, ids, "loss_change", kinds=["layers"]).values[f"{stack}.layers"]
    assert influence[1].abs() < 1e-6 and change[1].abs() < 1e-6
    assert influence[0] > 1e-4 and change[0].abs() > 1e-4
    plan = lp.select(graph, lp.Scores({f"{stack}.layers": influence}), 0.34, kinds=["layers"])
    assert plan.units[f"{stack}.layers"].kept.tolist() == [0, 2]
    pruned = lp.apply(model, plan)
    assert torch.allclose(pruned(ids).logits, model(ids).logits, atol=1e-5)


def test_layer_criteria_score_nothing_else():
    model = build("llama")
    with pytest.raises(lp.PrunerError, match="scores layers only"):
        lp.score(model, lp.trace(model), tokens(), "block_influence", kinds=["neurons"])


def test_cached_numbers_are_those_of_the_kinds(tmp_path):
    model, ids = build("llama"), tokens(4, 8)
    graph = lp.trace(model)
    for criterion in ("wanda", "taylor"):
        cache = tmp_path / criterion
        lp.score(model, graph, ids, criterion, kinds=["neurons"], cache=cache)
        for kinds in (["heads"], None if criterion == "wanda" else ["heads", "hidden"], ["neurons"]):
            cached = lp.score(model, graph, ids, criterion, kinds=kinds, cache=cache).values
            fresh = lp.score(model, graph, ids, criterion, kinds=kinds).values
            assert cached.keys() == fresh.keys() and all(torch.equal(cached[n], fresh[n]) for n in fresh)
    before = (tmp_path / "taylor").stat().st_mtime_ns
    lp.score(model, graph, ids, "taylor", kinds=["neurons"], cache=tmp_path / "taylor")
    assert (tmp_path / "taylor").stat().st_mtime_ns == before


def test_criteria_that_run_the_model_need_its_weights():
    model = build("llama")
    pairs, bare = dict(model.named_parameters()), build("llama").to("meta")
    assert lp.score(bare, lp.trace(bare), criterion="l1", weights=pairs.items()).values
    for criterion in ("taylor", "wanda"):
        with pytest.raises(lp.PrunerError, match=f"{criterion} needs weights"):
            lp.score(bare, lp.trace(bare), tokens(2, 8), criterion, weights=pairs.items())


def test_products_over_many_slices_keep_their_order():
    torch.manual_seed(0)
    slices = 10.0 ** (2 * torch.randn(5, 8, 1).double() - 4)
    few, many = AGGREGATIONS["prod"](slices), AGGREGATIONS["prod"](slices.repeat(100, 1, 1))
    assert torch.equal(few, slices.prod(0)) and torch.equal(many.flatten().argsort(), few.flatten().argsort())
    assert many.isfinite().all() and many.unique().numel() == few.unique().numel()
    slices[0, 3] = 0
    assert AGGREGATIONS["prod"](slices.repeat(100, 1, 1))[3] == 0


@pytest.mark.parametrize("name", ("openai-gpt", "blt"))
def test_a_layer_is_scored_as_if_it_passed_its_input_on(name):
    """Also where layers return lists, or others lie between them."""
    model, ids = tiny_model(name), tokens(2, 8)
    for unit in lp.trace(model).of_kind("layers"):
        layers = model.get_submodule(unit.name.removesuffix(".layers"))
        scores = score_layers(model, unit, "loss_change", ids, compute=native_compute(model))
        before, count = total_loss(model, [ids])
        for layer, score in zip(layers, scores, strict=True):
            if not score.isinf():
                hook = (layer, lambda _, args, kwargs, output: with_hidden(output, hidden_in(args, kwargs)))
                with forward_hooks([hook], with_kwargs=True):
                    assert (total_loss(model, [ids])[0] - before) / count == pytest.approx(score.item(), abs=1e-5)


def test_layers_that_others_need_are_named():
    model = tiny_model("gemma3n_text")  # whose last layers read keys and values of earlier ones
    unit = lp.trace(model).unit("model.layers.layers")
    with pytest.raises(lp.PrunerError, match="does not run without layer 0"):
        score_layers(model, unit, "cosine", tokens(2, 8), compute=native_compute(model))
