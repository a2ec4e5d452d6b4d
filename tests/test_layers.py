"""Removal of whole layers and of their attention or MLP blocks."""

import json
from itertools import pairwise

import pytest
import torch
from helpers.architectures import tiny_model
from helpers.media import model_of, save_llava
from helpers.models import build, made, tokens
from helpers.shapes import FAMILIES, planned
from transformers import AutoConfig, LlavaForConditionalGeneration

import llm_pruner as lp
from llm_pruner.importance.score import score_blocks
from llm_pruner.media import trace_media
from llm_pruner.models.hooks import forward_hooks
from llm_pruner.models.layers import hidden_out
from llm_pruner.models.running import relative_difference
from llm_pruner.pruning.whole_layers import describe_dropped
from llm_pruner.selection.plan import PruningPlan


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


def test_strategies_choose_the_documented_layers():
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
    assert [layer.skip for layer in loaded.config.per_layer_config][:3] == [["mlp"], ["attention"], ["mlp"]]
    assert relative_difference(loaded(ids).logits, found.pruned(ids).logits) < 1e-6
    with_cache, without = (
        loaded.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, use_cache=c) for c in (True, False)
    )
    assert torch.equal(with_cache, without)
    plan = lp.select(lp.trace(loaded), lp.score(loaded, lp.trace(loaded), criterion="random"), 0.5, kinds=["neurons"])
    assert lp.verify(loaded, lp.apply(loaded, plan), plan).equivalent


def test_checkpoints_that_name_gone_blocks_in_one_place_only_load_as_before(tmp_path):
    """Folders from before ``skip`` and the refusal were written."""
    pruned = planned(build("llama_grouped"), drop_attention="1", drop_mlp="2").pruned
    lp.save(pruned, None, tmp_path / "old")
    file = tmp_path / "old" / "config.json"
    config = json.loads(file.read_text())
    assert config.pop("per_layer_config") == {"1": {"skip": ["attention"]}, "2": {"skip": ["mlp"]}}
    del config["experts_implementation"]
    file.write_text(json.dumps(config))
    loaded, _ = lp.load(str(tmp_path / "old"))
    assert torch.equal(loaded(tokens()).logits, pruned(tokens()).logits)


def test_blocks_of_a_model_that_reads_images(tmp_path):
    model = model_of("ViTForImageClassification")
    found = planned(model, drop_attention="1", drop_mlp="0")
    assert lp.verify(model, found.pruned, found.plan).equivalent
    lp.save(found.pruned, None, tmp_path / "pruned", plan=found.plan)
    assert lp.verify(model, lp.load(str(tmp_path / "pruned"))[0], found.plan).equivalent


def test_names_of_gone_blocks_follow_their_layers():
    """Widths are cut and a layer is dropped from a model without some blocks."""
    first = planned(build("llama_grouped", num_hidden_layers=4), drop_attention="2", drop_mlp="2,3").pruned
    graph = lp.trace(first)
    plan = lp.select(graph, lp.score(first, graph, criterion="l2"), 0.5, kinds=("neurons",), layers=[0])
    narrow = lp.apply(first, plan)
    assert narrow.config.per_layer_config[0].intermediate_size < narrow.config.per_layer_config[1].intermediate_size
    assert [layer.skip for layer in narrow.config.per_layer_config] == [[], [], ["attention", "mlp"], ["mlp"]]
    fewer = planned(narrow, drop_layers="1").pruned
    assert [layer.skip for layer in fewer.config.per_layer_config] == [[], ["attention", "mlp"], ["mlp"]]


def test_a_block_that_is_gone_comes_back_as_zeros():
    from llm_pruner.surgery.uniform import to_uniform

    model = build("llama_grouped")
    found = planned(model, drop_attention="1", drop_mlp="2")
    ids = tokens()
    assert relative_difference(to_uniform(found.pruned)(ids).logits, found.pruned(ids).logits) < 1e-6


@pytest.mark.parametrize("depth", ["last", "spaced_middle", "block_influence", "cosine", "loss", "loss_change"])
@pytest.mark.parametrize("family", ("llama_grouped", "gpt2", "gemma3_text", "mixtral"))
def test_blocks_are_chosen_by_every_criterion(family, depth):
    model = build(family, **{"n_layer" if family == "gpt2" else "num_hidden_layers": 5})
    found = planned(model, tokens(4, 16), depth=depth, num_attention="3", num_mlp="4")
    layers = [int(path.split(".")[2]) for path in found.plan.blocks]
    assert len(layers) == 3 and 0 not in layers[:2] and lp.verify(model, found.pruned, found.plan).equivalent
    if depth == "last":
        assert layers == [3, 4, 4]


@pytest.mark.parametrize(("block", "name"), [("attention", "self_attn"), ("mlp", "mlp")])
def test_scores_of_blocks_are_those_of_the_model_without_them(block, name):
    """Against models that lack a block: their loss, and the direction of what leaves the layer."""
    model, ids = build("llama", num_hidden_layers=4, seed=3), tokens(6, 16)
    layers = [1, 2, 3]
    blocks = {"model.layers.layers": [None, *(f"model.layers.{i}.{name}" for i in layers)]}

    def scores(criterion):
        values = score_blocks(
            model, lp.trace(model), ids, criterion, blocks=blocks, most={"model.layers.layers": 2}, device="cpu"
        )["model.layers.layers"]
        assert values[0] == torch.inf
        return values[1:].tolist()

    @torch.no_grad()
    def run(left, layer=0):
        seen = []
        with forward_hooks(
            [(left.model.layers[layer], lambda _, __, output: seen.append(hidden_out(output).double()))]
        ):
            loss = left(input_ids=ids, labels=ids).loss.item()
        return loss, seen[0]

    without = [run(planned(model, **{f"drop_{block}": str(i)}).pruned, i) for i in layers]
    whole = [run(model, i) for i in layers]
    losses = [loss - run(model)[0] for loss, _ in without]
    turned = [
        1 - torch.cosine_similarity(a, b, dim=-1).mean().item() for (_, a), (_, b) in zip(without, whole, strict=True)
    ]
    assert scores("loss_change") == pytest.approx(losses, abs=1e-5)
    assert scores("block_influence") == pytest.approx(turned, abs=1e-6)
    order = [layers[i] for i in torch.tensor(scores("loss")).argsort().tolist()]
    assert order[0] == layers[losses.index(min(losses))]
    pairs = {i: run(planned(model, **{f"drop_{block}": f"{order[0]},{i}"}).pruned)[0] for i in order[1:]}
    assert order[1] == min(pairs, key=pairs.get)


def test_blocks_of_what_an_encoder_decoder_has(tmp_path):
    """T5's attention passes the position bias of the first layer on, also where it is removed."""
    model = made("t5", seq2seq=True, **FAMILIES["t5"])
    found = planned(model, tokens(4, 16), num_attention="encoder.2", num_mlp="2,2")
    gone = [path.split(".")[0] for path in found.plan.blocks]
    assert gone.count("decoder") == 1 and set(gone) == {"encoder", "decoder"}
    assert lp.verify(model, found.pruned, found.plan).equivalent
    lp.save(found.pruned, None, tmp_path / "out", plan=found.plan)
    again, _ = lp.load(str(tmp_path / "out"))
    ids = {"input_ids": tokens(), "decoder_input_ids": tokens()}
    assert torch.equal(again(**ids).logits, found.pruned(**ids).logits)


def test_blocks_and_layers_go_together():
    """Blocks are counted among the layers that stay, the first of which keeps its attention."""
    model = build("llama_grouped", num_hidden_layers=5)
    found = planned(model, tokens(4, 16), drop_layers="0", num_attention="1", num_mlp="3")
    assert found.plan.blocks[:3] == [f"model.layers.{i}.self_attn" for i in (2, 3, 4)] and len(found.plan.blocks) == 4
    assert lp.verify(model, found.pruned, found.plan).equivalent
    with pytest.raises(lp.PrunerError, match="reads the length of the cache from it"):
        planned(model, drop_layers="0", drop_attention="1")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"num_attention": "3"}, "cannot keep 3, 3 layers of the model have attention: give 1 to 2"),
        ({"num_attention": "0"}, "give 1 to 2"),
        ({"num_mlp": "x"}, "is not valid: give numbers"),
        ({"num_mlp": "2,2"}, "--num_mlp names 2 stacks"),
        ({"num_attention": "2", "drop_attention": "1"}, "each names the attention to remove"),
        ({"num_mlp": "2", "drop_mlp": "1"}, "each names the MLPs to remove"),
        ({"num_mlp": "2", "uniform": True, "target_params": "0.8"}, "one makes all layers alike"),
        ({"num_mlp": "2", "depth": "contiguous"}, "chooses whole layers that follow each other: give another"),
    ],
)
def test_bad_numbers_of_blocks(flags, message):
    with pytest.raises(lp.PrunerError, match=message):
        planned(build("llama"), tokens(4, 16), **flags)


@pytest.mark.parametrize(
    ("name", "block", "path"),
    [
        ("bloom", "attention", "transformer.h.1.self_attention"),
        ("bloom", "mlp", "transformer.h.1.mlp"),
        ("mpt", "mlp", "transformer.blocks.1.ffn"),
        ("bert", "attention", "bert.encoder.layer.1.attention"),
    ],
)
def test_blocks_that_hand_on_the_stream_stay(name, block, path):
    """Their output is the sum with the stream, or its norm: without them the layer would hand on nothing."""
    model = tiny_model(name)
    message = f"{path} cannot be removed: the residual stream of its layer runs through it"
    with pytest.raises(lp.PrunerError, match=f"--drop_{block} 1: {message}"):
        planned(model, tokens(4, 16), **{f"drop_{block}": "1"})
    with pytest.raises(lp.PrunerError, match="the residual stream of its layer runs through it"):
        planned(model, tokens(4, 16), **{f"num_{block}": "1"})
    plan = PruningPlan()
    plan.drop_block(path, lp.trace(model).shapes)
    with pytest.raises(lp.PrunerError, match=message):
        lp.apply(model, plan)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"drop_layers": "9"}, "out of range"),
        ({"drop_layers": "x"}, "is not valid: give numbers"),
        ({"drop_layers": "0,1,2"}, "--drop_layers names all layers of the model: leave one out"),
        ({"num_layers": "3"}, "give fewer"),
        ({"num_layers": "0"}, "cannot keep 0"),
        ({"num_layers": "2,2"}, "names 2 stacks"),
        ({"num_layers": "2", "drop_layers": "1"}, "each names the layers to remove"),
        ({"num_layers": "2", "depth": "best"}, "choose from"),
        ({"drop_layers": "1", "depth": "loss"}, "give one"),
        ({"drop_attention": "0"}, "reads the length of the cache from it"),
        ({"drop_mlp": "7"}, "out of range"),
        ({"shares": "layers=1,neurons=1"}, "--shares needs one of --target_params, --target_macs"),
        ({"kinds": "layers", "target_macs": "0.8"}, "under --target_params, not --target_macs: give that"),
        ({"shares": "layers", "target_params": "0.5"}, "is not valid: give proportions"),
        ({"shares": "vocabulary=1", "target_params": "0.5"}, "tokens are pruned by llm-pruner vocab"),
        ({"shares": "measured:heds", "target_params": "0.5"}, "choose from heads"),
        ({"num_layers": "2", "depth": "loss"}, "needs? a calibration set"),
    ],
)
def test_bad_depth(flags, message):
    with pytest.raises(lp.PrunerError, match=message):
        planned(build("llama"), **flags)


def test_dropped_layers_are_named_without_the_path_of_the_only_stack():
    graph = lp.trace(build("llama"))
    plan = PruningPlan()
    plan.keep(graph.unit("model.layers.layers"), torch.tensor([0, 2]), graph.shapes)
    assert describe_dropped(plan, graph) == "layers 1"


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


def test_token_ids_are_no_layers():
    """A list of small ids looks like one of layers' indices."""
    model = build("llama", num_hidden_layers=6, eos_token_id=[2, 5])
    pruned = planned(model, tokens(), depth="last", num_layers="3").pruned
    assert pruned.config.eos_token_id == pruned.generation_config.eos_token_id == [2, 5]


@pytest.mark.parametrize(("states", "fewer"), [(-2, -1), (3, 3), ([1, -2], [1, -1])])
def test_a_model_reads_the_same_hidden_states_of_a_shorter_tower(states, fewer, tokenizer, tmp_path):
    """LLaVA reads the state before its tower's last layer, which is the first to go."""
    save_llava(tokenizer, tmp_path / "llava", vision_layers=4)
    config = AutoConfig.from_pretrained(tmp_path / "llava")
    config.vision_feature_layer = states
    model = LlavaForConditionalGeneration(config).eval()
    graph = trace_media(model)
    plan = PruningPlan()
    plan.keep(graph.unit("model.vision_tower.encoder.layers.layers"), torch.arange(3), graph.shapes)
    pruned = lp.apply(model, plan)
    assert pruned.config.vision_feature_layer == fewer
    assert lp.verify(model, pruned, plan).equivalent
