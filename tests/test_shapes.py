"""Whole layers, blocks of layers, shapes that are named, proportions."""

import json
from itertools import pairwise

import pytest
import torch
from helpers.models import build, made, tokens
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

import llm_pruner as lp
from llm_pruner.models.running import relative_difference
from llm_pruner.pruning.arguments import PruneArguments
from llm_pruner.pruning.context import Planning
from llm_pruner.pruning.planning import make_plan
from llm_pruner.pruning.settings import resolve_settings


def planned(model, ids=None, **flags):
    arguments = PruneArguments.of(**({"preset": "paper", "pruner_type": "random"} | flags))
    return make_plan(Planning(settings=resolve_settings(arguments), ids=ids), model)


FAMILIES = {
    "llama": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 8},
    "llama_grouped": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
    "qwen3": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 16,
    },
    "gpt2": {"n_embd": 64, "n_layer": 4, "n_head": 8},
    "bloom": {"hidden_size": 64, "n_layer": 4, "n_head": 8},
    "opt": {
        "hidden_size": 64,
        "word_embed_proj_dim": 64,
        "ffn_dim": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
    },
    "t5": {"d_model": 64, "d_kv": 8, "d_ff": 96, "num_layers": 4, "num_decoder_layers": 3, "num_heads": 8},
    "mixtral": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "num_local_experts": 4,
    },
    "phi3": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
}
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
        ({H: 48, "target_params": "0.5"}, "a target shape says all"),
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


@pytest.mark.parametrize("strategy", ("last", "spaced_middle", "block_influence", "cosine", "loss", "contiguous"))
@pytest.mark.parametrize("family", ("llama", "gpt2", "gemma3_text", "t5"))
def test_depth(family, strategy, tmp_path):
    """Layers go by every strategy, the result is the masked original, and says the same reloaded, with its cache."""
    layers = {"num_hidden_layers": 6} if family != "gpt2" else {"n_layer": 6}
    if family == "t5":
        model = made("t5", seq2seq=True, **FAMILIES["t5"])
        flags = {"num_layers": "3,2"}
    else:
        model, flags = build(family, **layers), {"num_layers": "4"}
    found = planned(model, tokens(4, 16), depth=strategy, **flags)
    assert found.scores is None and not found.pruned.config.to_dict().get("per_layer_config")
    assert lp.verify(model, found.pruned, found.plan).equivalent
    lengths = {path: len(kept) for path, kept in found.plan.layers.items()}
    assert sorted(lengths.values()) == ([2, 3] if family == "t5" else [4])
    if family == "t5":  # their first layers hold the position bias of all
        assert all(kept[0] == 0 for kept in found.plan.layers.values())
    if family == "gemma3_text":
        (kept,) = found.plan.layers.values()
        assert found.pruned.config.layer_types == [model.config.layer_types[i] for i in kept.tolist()]
    lp.save(found.pruned, None, tmp_path / "out", plan=found.plan)
    loaded, ids = type(model).from_pretrained(tmp_path / "out").eval(), tokens(1, 8)
    with_cache, without = (
        loaded.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, use_cache=cache)
        for cache in (True, False)
    )
    assert torch.equal(with_cache, without)


def test_strategies_choose_what_they_say():
    model = build("llama", num_hidden_layers=8)
    graph, ids = lp.trace(model), tokens(4, 16)

    def goes(strategy, count):
        scores = lp.score(model, graph, ids, strategy)
        kept = lp.select(graph, scores, counts={"layers": 8 - count}).layers["model.layers"].tolist()
        return [i for i in range(8) if i not in kept]

    assert goes("last", 3) == [5, 6, 7]
    assert goes("spaced_middle", 1) == [4] and goes("spaced_middle", 2) == [2, 5]
    for count in range(2, 5):
        chosen = goes("spaced_middle", count)
        assert all(b - a >= 2 for a, b in pairwise(chosen))
    block = goes("contiguous", 3)
    assert block == list(range(block[0], block[0] + 3))
    with torch.no_grad():  # by hand: the angle between what goes into a block and what comes out
        states = [s.double() for s in model(ids, output_hidden_states=True).hidden_states[:-1]]
        seen = []
        handle = model.model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].double()))
        model(ids)
        handle.remove()
        states.append(seen[0])
        angles = [torch.cosine_similarity(states[i], states[i + 3], dim=-1).mean().arccos() for i in range(6)]
    assert block[0] == min(range(6), key=lambda i: angles[i])


def test_greedy_loss_measures_each_removal_anew():
    """The order of removal, checked against all that could have been removed, one model a time."""
    model = build("llama", num_hidden_layers=5, seed=3)
    graph, ids = lp.trace(model), tokens(6, 16)

    def loss(kept):
        values = torch.full((5,), torch.inf, dtype=torch.float64)
        values[[i for i in range(5) if i not in kept]] = 0.0
        named = lp.Scores({"model.layers.layers": values})
        left = lp.apply(model, lp.select(graph, named, counts={"layers": len(kept)})) if len(kept) < 5 else model
        return left(input_ids=ids, labels=ids).loss.item()

    scores = lp.score(model, graph, ids, "loss").values["model.layers.layers"]
    order, kept = scores.argsort().tolist(), list(range(5))
    costs = {i: loss([j for j in kept if j != i]) for i in kept}
    assert order[0] == min(costs, key=costs.get)
    assert scores[order[0]].item() == pytest.approx(costs[order[0]] - loss(kept), abs=1e-5)
    change = lp.score(model, graph, ids, "loss_change").values["model.layers.layers"]
    assert change[2].item() == pytest.approx(costs[2] - loss(kept), abs=1e-5)
    first = lp.score(model, graph, ids, "loss", most=1).values["model.layers.layers"]
    assert first.argmin() == order[0] and first.isfinite().all()


@pytest.mark.parametrize("family", ("llama_grouped", "gpt2", "gemma3_text", "mixtral"))
def test_blocks_of_layers_go(family, tmp_path):
    """The attention of one layer and the MLP of another: the masked original, with caches, saved, padded back."""
    model = build(family)
    found = planned(model, drop_attention="1", drop_mlp="0,2")
    assert len(found.plan.blocks) == 3 and not found.plan.units
    assert lp.verify(model, found.pruned, found.plan).equivalent
    fewer = sum(t.numel() for n, t in model.named_parameters() if n in found.plan.kept)
    assert sum(p.numel() for p in found.pruned.parameters()) == sum(p.numel() for p in model.parameters()) - fewer
    lp.save(found.pruned, None, tmp_path / "out", plan=found.plan, standalone=True)
    again = lp.PruningPlan.load(tmp_path / "out" / "pruning_plan.json", verify=True)
    assert again.blocks == found.plan.blocks
    loaded, ids = type(model).from_pretrained(tmp_path / "out").eval(), tokens(2, 8)
    assert relative_difference(loaded(ids).logits, found.pruned(ids).logits) < 1e-6
    with_cache, without = (
        loaded.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, use_cache=c) for c in (True, False)
    )
    assert torch.equal(with_cache, without)
    plan = lp.select(lp.trace(loaded), lp.score(loaded, lp.trace(loaded), criterion="random"), 0.5, kinds=["neurons"])
    assert lp.verify(loaded, lp.apply(loaded, plan), plan).equivalent


def test_a_block_that_is_gone_comes_back_as_zeros():
    from llm_pruner.surgery.uniform import to_uniform

    model = build("llama_grouped")
    found = planned(model, drop_attention="1", drop_mlp="2")
    ids = tokens()
    assert relative_difference(to_uniform(found.pruned)(ids).logits, found.pruned(ids).logits) < 1e-6


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"drop_layers": "9"}, "out of range"),
        ({"drop_layers": "x"}, "is not valid: give numbers"),
        ({"drop_layers": "0,1,2"}, "keep 0|at least one"),
        ({"num_layers": "3"}, "give fewer"),
        ({"num_layers": "0"}, "cannot keep 0"),
        ({"num_layers": "2,2"}, "names 2 stacks"),
        ({"num_layers": "2", "drop_layers": "1"}, "each says which layers go"),
        ({"num_layers": "2", "depth": "best"}, "choose from"),
        ({"drop_layers": "1", "depth": "loss"}, "give one"),
        ({"drop_attention": "0"}, "caches are measured by it"),
        ({"drop_mlp": "7"}, "out of range"),
        ({"shares": "layers=1,neurons=1"}, "--shares needs --target_params or"),
        ({"shares": "layers", "target_params": "0.5"}, "is not valid: give proportions"),
        ({"shares": "vocabulary=1", "target_params": "0.5"}, "tokens are pruned by llm-pruner vocab"),
        ({"shares": "measured:heds", "target_params": "0.5"}, "choose from heads"),
        ({"num_layers": "2", "depth": "loss"}, "needs? a calibration set"),
    ],
)
def test_bad_depth(flags, message):
    with pytest.raises(lp.PrunerError, match=message):
        planned(build("llama"), **flags)


def test_depth_and_width_in_one_plan(tmp_path):
    """One plan for all: applied at once it is the masked original, and what two steps give."""
    model = build("llama_grouped", num_hidden_layers=5)
    ids = tokens(8, 16)
    whole = sum(p.numel() for p in model.parameters())
    found = planned(
        model,
        ids,
        pruner_type="taylor",
        num_layers="4",
        drop_mlp="3",
        depth="block_influence",
        block_wise=True,
        block_attention_layer_start=0,
        block_mlp_layer_start=0,
        block_mlp_layer_end=3,
        target_params="0.6",
        compensate="none",
    )
    assert lp.verify(model, found.pruned, found.plan).equivalent
    assert 0.55 * whole < sum(p.numel() for p in found.pruned.parameters()) <= 0.6 * whole
    at_once = lp.apply(model, found.plan)
    assert all(torch.equal(a, b) for a, b in zip(at_once.parameters(), found.pruned.parameters(), strict=True))
    found.plan.save(tmp_path / "plan.json")
    loaded = lp.PruningPlan.load(tmp_path / "plan.json")
    assert loaded.layers["model.layers"].tolist() == found.plan.layers["model.layers"].tolist()
    assert set(loaded.units) == set(found.plan.units)


def test_vocabulary_depth_and_widths_in_one_plan():
    model = build("llama_grouped", num_hidden_layers=4)
    graph = lp.trace(model)
    scores = lp.score(model, graph, criterion="random")
    plan = lp.select(
        graph, scores, {"neurons": 0.5, "heads": 0.5}, counts={"layers": 3, "vocabulary": 40}, target_params=0.6
    )
    kinds = {choice.kind for choice in plan.units.values()}
    assert kinds >= {"layers", "vocabulary", "neurons"}
    pruned = lp.apply(model, plan)
    config = pruned.config
    assert config.num_hidden_layers == 3 and config.vocab_size == 40
    kept = torch.tensor(plan.tokens)
    # The same with all tokens: token ids move, the logits of those kept do not.
    without = lp.select(graph, scores, counts={u: len(c.kept) for u, c in plan.units.items() if c.kind != "vocabulary"})
    narrow = lp.apply(model, without)
    new = torch.randint(0, 40, (2, 8), generator=torch.Generator().manual_seed(0))
    assert relative_difference(pruned(new).logits, narrow(kept[new]).logits[..., kept]) < 1e-6


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


def test_layers_of_models_that_differ_by_layer_go():
    """Per-layer widths, blocks and constants move with their layers."""
    for name in ("llama_grouped", "gpt2"):
        model = build(name)
        graph = lp.trace(model)
        scores = lp.score(model, graph, criterion="random")
        narrow = lp.apply(model, lp.select(graph, scores, 0.5, kinds=["heads", "neurons"], layers=[0, 2]))
        found = planned(narrow, drop_layers="1")
        assert lp.verify(narrow, found.pruned, found.plan).equivalent
    bloom = made("bloom", hidden_size=48, n_layer=3, n_head=6)
    graph = lp.trace(bloom)
    scores = lp.score(bloom, graph, criterion="random")
    narrow = lp.apply(bloom, lp.select(graph, scores, 0.5, kinds=["heads"], layers=[1, 2]))
    found = planned(narrow, drop_layers="0")
    assert lp.verify(narrow, found.pruned, found.plan).equivalent


@pytest.mark.parametrize(
    ("family", "fields", "drop", "kept"),
    [
        (
            "deepseek_v3",
            {
                "hidden_size": 32,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "num_hidden_layers": 5,
                "intermediate_size": 48,
                "moe_intermediate_size": 24,
                "q_lora_rank": 12,
                "kv_lora_rank": 10,
                "qk_nope_head_dim": 8,
                "qk_rope_head_dim": 4,
                "v_head_dim": 8,
                "n_routed_experts": 4,
                "n_group": 1,
                "topk_group": 1,
                "num_experts_per_tok": 2,
                "first_k_dense_replace": 2,
            },
            "1,3",
            lambda c: c.first_k_dense_replace == 1 and c.num_hidden_layers == 3,
        ),
        (
            "qwen2_moe",
            {
                "hidden_size": 32,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "num_hidden_layers": 5,
                "intermediate_size": 48,
                "moe_intermediate_size": 24,
                "shared_expert_intermediate_size": 24,
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "mlp_only_layers": [1, 4],
            },
            "0,3",
            lambda c: c.mlp_only_layers == [0, 2],
        ),
    ],
)
def test_patterns_of_layers_move_along(family, fields, drop, kept):
    model = made(family, **fields)
    found = planned(model, drop_layers=drop)
    assert kept(found.pruned.config)
    assert lp.verify(model, found.pruned, found.plan).equivalent
