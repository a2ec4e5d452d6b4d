"""Shapes that are named, proportions between kinds."""

import json

import pytest
import torch
from helpers.models import build, made, tokens
from helpers.shapes import FAMILIES, planned
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

import llm_pruner as lp
from llm_pruner.models.running import relative_difference

H, M, A, K, L, D = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "num_hidden_layers",
    "num_decoder_layers",
)
# The flags given, and what the config must say of them by its own names.
TARGETS = [
    ("llama", {H: 48}),
    ("llama", {M: 40}),
    ("llama", {L: 2}),
    ("llama", {H: 32, A: 4}),
    ("llama", {H: 40, M: 64, A: 4, K: 4, L: 3}),
    ("llama_grouped", {A: 4}),
    ("llama_grouped", {A: 4, K: 2}),
    ("llama_grouped", {A: 2, K: 2}),
    ("llama_grouped", {H: 48, M: 72, A: 6, K: 3, L: 3}),
    ("llama_grouped", {H: 16, M: 8, A: 1, K: 1, L: 1}),
    ("qwen3", {H: 48}),
    ("qwen3", {A: 4, K: 4}),
    ("qwen3", {H: 32, M: 64, A: 6, K: 3, L: 2}),
    ("qwen3", {H: 63, L: 1}),
    ("gpt2", {H: 32, A: 4}),
    ("gpt2", {M: 100}),
    ("gpt2", {L: 3}),
    ("gpt2", {H: 48, A: 6, M: 160, L: 2}),
    ("bloom", {L: 2}),
    ("bloom", {H: 32, A: 4}),
    ("bloom", {H: 48, A: 6, L: 3}),
    ("opt", {M: 48}),
    ("opt", {H: 32, A: 4, "word_embed_proj_dim": 32}),
    ("opt", {H: 48, A: 6, M: 40, L: 2, "word_embed_proj_dim": 48}),
    ("t5", {H: 48}),
    ("t5", {M: 40}),
    ("t5", {A: 4}),
    ("t5", {H: 32, M: 64, A: 6, L: 2, D: 2}),
    ("t5", {L: 3, D: 1}),
    ("mixtral", {H: 48}),
    ("mixtral", {M: 40}),
    ("mixtral", {"num_local_experts": 3}),
    ("mixtral", {H: 32, M: 64, A: 4, K: 2, L: 2}),
    ("phi3", {A: 4, K: 2}),
    ("phi3", {H: 32, M: 40, A: 4, K: 4, L: 2}),
]
OWN = {
    ("gpt2", M): "n_inner",
    ("opt", M): "ffn_dim",
    ("t5", M): "d_ff",
}
FLAGS = (H, M, A, K, L, D)


@pytest.mark.parametrize(("family", "shape"), TARGETS, ids=[f"{f}-{i}" for i, (f, _) in enumerate(TARGETS)])
def test_a_shape_is_had_exactly(family, shape, tmp_path):
    """The config is a stock one with the sizes asked for; what it builds has the weights' shapes and loads anywhere."""
    model = made(family.removesuffix("_grouped"), seq2seq=family == "t5", **FAMILIES[family])
    flags = {name: value for name, value in shape.items() if name in FLAGS}
    if flags != shape:
        (tmp_path / "target.json").write_text(json.dumps(shape))
        flags = {"target_config": str(tmp_path / "target.json")}
    found = planned(model, depth="spaced_middle", **flags)
    config = found.pruned.config
    for name, value in shape.items():
        own = OWN.get((family, name), config.attribute_map.get(name, name))
        assert getattr(config, own) == value
    same = type(config).from_dict(json.loads(config.to_json_string(use_diff=False)))
    auto = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
    stock = auto.from_config(same)
    assert {n: t.shape for n, t in stock.state_dict().items()} == {
        n: t.shape for n, t in found.pruned.state_dict().items()
    }
    kinds = {choice.kind for choice in found.plan.units.values()}
    if family != "bloom" or A not in shape:  # ALiBi's slopes are those of the new number of heads
        normed = any(found.graph.unit(name).flags for name in found.plan.units if "hidden" not in name)
        if not normed and (family != "t5" or H not in shape):  # T5 scales logits by the hidden size
            assert lp.verify(model, found.pruned, found.plan).equivalent, kinds
    lp.save(found.pruned, None, tmp_path / "out", plan=found.plan)
    ids = tokens(2, 8)
    loaded = auto.from_pretrained(tmp_path / "out").eval()
    more = {"decoder_input_ids": ids} if family == "t5" else {}
    with torch.no_grad():
        assert relative_difference(loaded(ids, **more).logits, found.pruned(ids, **more).logits) < 1e-6
    again = lp.PruningPlan.load(tmp_path / "out" / "pruning_plan.json")
    rebuilt = lp.apply(model, again, config=config)
    assert all(torch.equal(a, b) for a, b in zip(rebuilt.parameters(), found.pruned.parameters(), strict=True))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({H: 80}, "cannot grow"),
        ({A: 6, K: 4}, "these can: num_attention_heads 4, num_attention_heads 8"),
        ({A: 3, K: 3}, "not a multiple"),
        ({L: 9}, "cannot keep 9"),
        ({K: 5}, "cannot be reached"),
        ({D: 2}, "has no num_decoder_layers"),
        ({H: 48, "target_params": "0.5"}, "a target shape determines all widths"),
        ({H: 0}, "out of range"),
        ({"target_config": "nowhere.json"}, "cannot read"),
        ({H: 64}, "already"),
    ],
)
def test_shapes_that_cannot_be_had(flags, message):
    model = made("llama", **FAMILIES["llama_grouped"])
    with pytest.raises(lp.PrunerError, match=message):
        planned(model, depth="last", **flags)


def test_heads_get_narrower_where_nothing_turns_their_channels():
    """GPT-2 without rotary positions: eight heads of eight channels each become eight of four, not four of eight."""
    found = planned(made("gpt2", **FAMILIES["gpt2"]), **{H: 32})
    assert found.pruned.config.n_head == 8 and found.pruned.config.n_embd == 32
    assert {c.kind for c in found.plan.units.values()} == {"hidden", "channels", "neurons"}
    with pytest.raises(lp.PrunerError, match="these can: hidden_size 60, hidden_size 64"):
        planned(made("gpt2", **FAMILIES["gpt2"] | {"n_head": 4}), **{H: 62})


@pytest.mark.parametrize("criterion", ("taylor", "activation", "l2"))
@pytest.mark.parametrize("family", ("llama_grouped", "gpt2", "opt"))
def test_dead_channels_go_and_nothing_changes(family, criterion):
    """Hidden channels that are zero throughout: any criterion finds them, and mended norms make the model exact."""
    model = build("llama_grouped", hidden_size=32, head_dim=8) if family == "llama_grouped" else build(family)
    graph = lp.trace(model)
    unit = next(u for u in graph.units if u.kind == "hidden")
    dead = [3, 8, 13, 30, 17, 21, 22, 29]
    with torch.no_grad():
        for (name, dim), label in unit.dims.items():
            tensor = model.get_parameter(name)
            where = torch.isin(label, torch.tensor(dead)).nonzero().flatten()
            tensor.index_fill_(dim, where, 0.0)
    ids = tokens(4, 16)
    scores = lp.score(model, graph, ids, criterion, kinds=["hidden"])
    plan = lp.select(graph, scores, counts={"hidden": 24})
    assert sorted(set(range(32)) - set(plan.units[unit.name].kept.tolist())) == sorted(dead)
    pruned = lp.apply(model, plan)
    assert lp.verify(model, pruned, plan).equivalent
    if family == "llama_grouped":  # a mean of squares over fewer channels; the factor is the same for every token
        from llm_pruner.refit.norms import rescale_norms

        off = relative_difference(pruned(ids).logits, model(ids).logits)
        factors = rescale_norms(model, pruned, plan, ids)
        assert factors and all(f == pytest.approx((24 / 32) ** -0.5, rel=1e-3) for f in factors.values())
        assert relative_difference(pruned(ids).logits, model(ids).logits) < 1e-4 < off


def test_norms_that_multiply_by_one_more_are_rescaled_too():
    from llm_pruner.refit.norms import rescale_norms

    model = build("gemma3_text")
    graph = lp.trace(model)
    scores = lp.score(model, graph, criterion="random", kinds=["hidden"])
    plan = lp.select(graph, scores, counts={"hidden": 24})
    pruned = lp.apply(model, plan)
    before = {n: p.clone() for n, p in pruned.named_parameters()}
    factors = rescale_norms(model, pruned, plan, tokens(4, 16))
    for path, factor in factors.items():
        name = f"{path}.weight"
        torch.testing.assert_close(1 + dict(pruned.named_parameters())[name], factor * (1 + before[name]))
    assert len(factors) == 1 + 4 * 3


@pytest.mark.parametrize("shares", ("layers=2,neurons=1", "neurons=3,heads=1", "measured", "measured:neurons,heads"))
def test_proportions_meet_a_target(shares):
    model = build("llama_grouped", num_hidden_layers=6, intermediate_size=96)
    whole = sum(p.numel() for p in model.parameters())
    found = planned(
        model, tokens(8, 16), pruner_type="taylor", depth="block_influence", shares=shares, target_params="0.7"
    )
    assert 0.7 * whole * 0.97 < sum(p.numel() for p in found.pruned.parameters()) <= 0.7 * whole
    assert lp.verify(model, found.pruned, found.plan).equivalent
    kinds = {choice.kind for choice in found.plan.units.values()}
    assert kinds <= {"layers", "neurons", "heads"} and kinds & {"neurons", "layers"}


def test_proportions_are_kept():
    """Three times the share of the neurons as of the heads, and the other way round."""
    model = build("llama_grouped", intermediate_size=512, num_attention_heads=32, num_key_value_heads=32, head_dim=4)
    graph = lp.trace(model)
    for shares, expected in (("neurons=3,heads=1", 3.0), ("neurons=1,heads=2", 0.5)):
        found = planned(model, tokens(8, 16), pruner_type="taylor", shares=shares, target_params="0.75").plan
        lost = {}
        for kind in ("neurons", "heads"):
            units = graph.of_kind(kind)
            kept = sum(len(found.units[u.name].kept) if u.name in found.units else u.size for u in units)
            lost[kind] = 1 - kept / sum(u.size for u in units)
        assert lost["neurons"] / lost["heads"] == pytest.approx(expected, rel=0.15)
